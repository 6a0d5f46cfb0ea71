"""The Restorer: what goes in comes out, in its kind."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.restore.known import Known, noise
from train.restore.restorer import Restorer

SHIFT = 0.125


@pytest.fixture
def brighter() -> Restorer:
    return Restorer(Known(shift=SHIFT), 64)


@pytest.mark.parametrize("shape", [(70, 90), (70, 90, 1), (70, 90, 2), (70, 90, 3), (70, 90, 4), (2, 30, 40, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
def test_numpy_keeps_shape_dtype_and_alpha(brighter, shape, dtype):
    values = noise(*shape).numpy() * 0.8
    top = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1.0
    image = (values * top).astype(dtype)
    before = image.copy()
    result = brighter(image)
    assert (result.shape, result.dtype) == (shape, dtype)
    np.testing.assert_array_equal(image, before)
    colours = shape[-1] - (shape[-1] in (2, 4)) if len(shape) > 2 else shape[-1]
    moved = (result.astype(np.float64) - image)[..., :colours] / top
    assert np.abs(moved - SHIFT).max() < 2e-3 + 1 / 255 * (dtype == np.uint8)
    np.testing.assert_array_equal(result[..., colours:], image[..., colours:])


@pytest.mark.parametrize("dtype", [">u2", "<u2", ">f4"])
def test_arrays_of_either_order_of_bytes_are_taken(brighter, dtype):
    top = 65535 if "u" in dtype else 1.0
    image = (noise(20, 30, 3).numpy() * 0.8 * top).astype(dtype)
    result = brighter(image)
    assert result.dtype == np.dtype(dtype)
    assert np.abs((result.astype(np.float64) - image) / top - SHIFT).max() < 2e-3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 70, 90), (1, 70, 90), (4, 20, 30), (5, 3, 20, 30), (2, 1, 90, 70)])
def test_tensors_keep_shape_and_dtype(brighter, shape, dtype):
    image = (noise(*shape) * 0.8 * (255 if dtype == torch.uint8 else 1)).to(dtype)
    result = brighter(image)
    assert (result.shape, result.dtype) == (image.shape, dtype)
    scale = 255 if dtype == torch.uint8 else 1
    moved = (result.double() - image.double()).narrow(-3, 0, shape[-3] - (shape[-3] == 4)) / scale
    assert (moved - SHIFT).abs().max() < 8e-3


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16"])
def test_pillow_images_come_back_as_pillow_images(brighter, mode):
    if mode == "I;16":
        image = Image.fromarray((noise(30, 40) * 50000).numpy().astype(np.uint16))
    else:
        image = Image.fromarray((noise(30, 40, 3) * 200).numpy().astype(np.uint8)).convert(mode)
    image.info["icc_profile"] = b"a profile"
    result = brighter(image)
    kinds = {"P": "RGB", "1": "L", "CMYK": "RGB"}
    assert (result.mode, result.size) == (kinds.get(mode, mode), image.size)
    if mode in ("RGB", "L", "RGBA", "LA", "I;16"):
        plain = np.asarray(image).astype(float)
        top = 65535 if mode == "I;16" else 255
        moved = np.asarray(result).astype(float) - plain
        colours = {"LA": moved[..., :1], "RGBA": moved[..., :3]}.get(mode, moved)
        assert np.abs(colours / top - SHIFT).max() < 1 / 255
        assert result.info["icc_profile"] == b"a profile"
    if mode in ("RGBA", "LA"):
        np.testing.assert_array_equal(np.asarray(result)[..., -1], np.asarray(image)[..., -1])


def test_lists_are_restored_one_by_one(brighter):
    kinds = [noise(3, 9, 8) * 0.5, (noise(9, 8, 3) * 100).numpy().astype(np.uint8)]
    results = brighter(kinds)
    assert [type(each) for each in results] == [torch.Tensor, np.ndarray]


def test_a_batch_equals_its_pictures(brighter):
    stack = noise(5, 3, 40, 50)
    brighter._fitting[64, brighter._way(1.0, False)] = (64, 3)  # as on a GPU: three at once
    together = brighter(stack, strength=0.5)
    torch.testing.assert_close(together, torch.stack([brighter(each, strength=0.5) for each in stack]))
    assert brighter.network.sizes[:2] == [(40, 50)] * 2


def test_strength_tiles_and_progress(brighter):
    told = []
    image = noise(3, 200, 100) * 0.5
    half = brighter(image, strength=0.5, on_tile=lambda done, every: told.append((done, every)))
    torch.testing.assert_close(half, image + SHIFT / 2, rtol=0, atol=1e-6)
    assert told[-1][0] == told[-1][1] > 4
    brighter.network.sizes.clear()
    brighter(image, tile=None)
    assert brighter.network.sizes == [(200, 100)]
    brighter.network.sizes.clear()
    brighter(image, tile=96)
    assert max(brighter.network.sizes) == (96, 96)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 5, 7), np.uint8), r"\[4, 5, 7\]"),
        (np.zeros((4, 5, 3), np.int32), "int32"),
        (np.full((4, 5, 3), 200.0), "from 200 to 200: give values in"),
        (torch.full((3, 4, 5), float("nan")), "nan"),
        (torch.zeros(7, 4, 5), r"\[7, 4, 5\]"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), "int64"),
        (torch.zeros(3, 0, 5), r"\[3, 0, 5\]"),
        (Image.new("F", (4, 5)), "mode F"),
        ("photo.jpg", "a str is no picture"),
    ],
)
def test_what_is_no_picture_is_said(brighter, image, words):
    with pytest.raises(ValueError, match=words):
        brighter(image)


@pytest.mark.parametrize(
    ("how", "words"),
    [({"strength": 1.5}, "strength 1.5"), ({"tile": 8}, "at least 64"), ({"tile": "big"}, "tile big")],
)
def test_wrong_settings_are_said(brighter, how, words):
    with pytest.raises(ValueError, match=words):
        brighter(noise(3, 8, 8), **how)
    with pytest.raises(ValueError, match="fp32, bf16, fp16"):
        Restorer(Known(), 64, precision="fp8")


def test_bf16_is_close_and_used(tmp_path):
    from model.deblurrer import Deblurrer, build_backbone

    torch.manual_seed(0)
    network = Deblurrer(build_backbone("nafnet", width=8, enc_blk_nums=[1], dec_blk_nums=[1]))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    image = noise(3, 64, 64)
    plain, half = (Restorer(network, 64, precision=each)(image) for each in (None, "bf16"))
    assert not torch.equal(plain, half)
    assert (plain - half).abs().mean() < 0.02


def test_it_is_loaded_by_its_names(tmp_path, monkeypatch):
    from model.config import ModelConfig
    from model.deblurrer import build_deblurrer
    from model.pretrained import save_pretrained
    from sharpprior import Restorer as Public
    from train.config.file import build_config

    assert Public is Restorer
    section = {"backbone": {"name": "unet", "width": 8, "blocks": [1, 1]}, "prior": False}
    state = build_deblurrer(ModelConfig(**section)).state_dict()
    config = build_config({"model": section, "data": {"crop": 64}}).model_dump(mode="json")
    snapshot = tmp_path / "hub" / "models--somebody--unet" / "snapshots" / "abc"
    for place in (tmp_path / "a.safetensors", tmp_path / "runs" / "quick", snapshot / "only.safetensors"):
        save_pretrained(place, state, config)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    image = noise(3, 70, 80)
    for name in ("a.safetensors", tmp_path / "runs" / "quick", "quick", snapshot.parents[1], snapshot):
        restorer = Restorer.load(name, "cpu")
        assert restorer.tile == 96
        assert restorer(image).shape == image.shape
    monkeypatch.setattr("train.restore.names.SHIPPED", tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match=r"no model comes with.*--model"):
        Restorer.load(None, "cpu")
    for name in ("nothing", "some/body", tmp_path / "x.safetensors"):
        with pytest.raises(ValueError, match="no such model"):
            Restorer.load(name, "cpu")


def test_a_folder_of_pictures_with_snapshots_in_it_is_no_model(tmp_path):
    from train.restore.names import find_model, is_model

    for name, wanted in (("holiday", False), ("models--some--body", True)):
        (tmp_path / name / "snapshots" / "abc").mkdir(parents=True)
        (tmp_path / name / "snapshots" / "abc" / "a.safetensors").write_bytes(b"")
        assert is_model(tmp_path / name) == wanted
    assert find_model(tmp_path / "models--some--body").name == "a.safetensors"
