"""Pairs: rules 2, 4, 6 and 8 of blur synthesis, tiers, identity, and the errors a user meets."""

import json
import pickle
import subprocess
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.blur import (
    BlurConfig,
    pair_of_plan,
    plan_pair,
    sample_rng,
    severity_of,
    synthesize_pair,
)
from data.blur import photometry as camera
from data.blur.config import MotionConfig
from data.blur.generators import draw_path
from data.blur.kernel import kernel_of_path
from data.blur.trajectory import scale_to_extent
from data.image import psnr
from tests.data.blur.kernels import convolve_valid

ROOT = Path(__file__).parents[3]


def pair_from_seed(photo, box, seed, config, **options):
    """The pair whose meta["seed"] is `seed`, made again."""
    return pair_of_plan(plan_pair(photo, box, seed, config, **options))


GENERATORS = list(BlurConfig().generators.model_dump())
QUIET = {
    "curves": {"srgb": 1},
    "highlight_boost": [0, 0],
    "noise": {"shot": 0, "read": 0},
    "jpeg": {"probability": 0},
    "trails": {"share": 0},
    "isp": {"share": 0},
}


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A photograph-like picture: noise at every scale, [H, W, 3] uint8."""
    rng = sample_rng(seed, 0, "texture", 0)
    total = np.zeros((height, width, 3))
    for step in (1, 2, 4, 8, 16, 32, 64):
        coarse = rng.standard_normal((height // step + 2, width // step + 2, 3))
        total += step**0.7 * coarse.repeat(step, 0).repeat(step, 1)[:height, :width]
    total = (total - total.mean()) / total.std()
    return np.clip(120 + 45 * total, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return texture(420, 500)


@pytest.fixture(scope="module")
def tiles() -> list[np.ndarray]:
    """The bundled tiles."""
    found = []
    for path in sorted((ROOT / "data" / "samples").glob("*/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".jpg"):
                    data = np.frombuffer(tar.extractfile(member).read(), np.uint8)
                    found.append(cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))
    return found


# Extent in px → median input PSNR in dB over the bundled tiles, Gaussian-process blur without noise or JPEG.
CALIBRATION = {10: 24.2, 20: 22.1, 40: 20.5, 80: 19.2, 120: 18.6}


def quiet(**over) -> BlurConfig:
    return BlurConfig(photometry=QUIET, defocus={"share": 0}, **over)


def test_ground_truth_is_the_crop_itself_and_meta_is_json(photo):
    pair = synthesize_pair(photo, (60, 80, 128), sample_rng(1, 2, "a", 3), BlurConfig(), tier="severe")
    assert np.array_equal(pair.sharp, photo[60:188, 80:208])
    assert pair.blurry.shape == pair.sharp.shape
    assert pair.blurry.dtype == pair.sharp.dtype == np.uint8
    assert json.loads(json.dumps(pair.meta, allow_nan=False)) == pair.meta
    assert pair.meta["tier"] == severity_of(pair.meta["extent"]) == "severe"
    assert pair.meta["input_psnr"] == pytest.approx(psnr(pair.blurry, pair.sharp))
    assert not np.shares_memory(pair.sharp, photo)


@pytest.mark.parametrize("generator", GENERATORS)
def test_flip_gives_the_pair_of_the_mirrored_photo(photo, generator):
    config, mirrored = quiet(generators={generator: 1}), np.ascontiguousarray(photo[:, ::-1])
    pair = synthesize_pair(photo, (60, 80, 128), sample_rng(1, 2, "a", 3), config, tier="moderate", flip=True)
    assert np.array_equal(pair.sharp, photo[60:188, 80:208][:, ::-1])
    same = synthesize_pair(mirrored, (60, 500 - 80 - 128, 128), sample_rng(1, 2, "a", 3), config, tier="moderate")
    assert np.array_equal(pair.blurry, same.blurry)


def test_same_name_same_pair_another_name_another_pair(photo):
    box, config = (40, 50, 96), BlurConfig()
    one = synthesize_pair(photo, box, sample_rng(5, 1, "key", 0), config)
    np.random.seed(0)
    two = synthesize_pair(photo, box, sample_rng(5, 1, "key", 0), config)
    assert np.array_equal(one.blurry, two.blurry)
    assert one.meta == two.meta
    for other in (
        sample_rng(6, 1, "key", 0),
        sample_rng(5, 2, "key", 0),
        sample_rng(5, 1, "kez", 0),
        sample_rng(5, 1, "key", 1),
    ):
        assert synthesize_pair(photo, box, other, config).meta["seed"] != one.meta["seed"]
    again = pair_from_seed(photo, box, one.meta["seed"], config)
    assert np.array_equal(again.blurry, one.blurry)


def test_random_numbers_are_the_same_in_another_process():
    code = "from data.blur import sample_rng; print(sample_rng(3, 4, 'sample_7', 2).bytes(16).hex())"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONHASHSEED": "99"}
    ).stdout.strip()
    assert out == sample_rng(3, 4, "sample_7", 2).bytes(16).hex()


def blurry_in_worker(key: str) -> bytes:
    return synthesize_pair(texture(300, 300), (60, 60, 96), sample_rng(1, 0, key, 0), BlurConfig()).blurry.tobytes()


def test_pairs_do_not_depend_on_the_worker_or_its_order():
    keys = [f"k{i}" for i in range(6)]
    with ProcessPoolExecutor(2) as pool:
        spread = list(pool.map(blurry_in_worker, reversed(keys)))
    assert spread[::-1] == [blurry_in_worker(key) for key in keys]


def test_a_plan_sent_to_another_process_makes_the_same_pair(photo):
    for i, generator in enumerate(GENERATORS):
        config = BlurConfig(generators={generator: 1})
        plan = plan_pair(
            photo, (150, 170, 64), sample_rng(0, 0, generator, 0).bytes(16).hex(), config, flip=bool(i % 2)
        )
        sent = pickle.dumps(plan)
        pair = pair_of_plan(pickle.loads(sent))
        whole = pair_from_seed(photo, (150, 170, 64), plan.seed, config, flip=bool(i % 2))
        assert np.array_equal(pair.blurry, whole.blurry)
        assert pair.meta == whole.meta


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.tuples(*[st.integers(0, 255)] * 3),
    st.sampled_from([*GENERATORS, "identity"]),
    st.integers(0, 2**20),
    st.booleans(),
)
def test_a_constant_photo_stays_constant_whatever_the_blur_curve_and_highlights(colour, generator, seed, flip):
    flat = np.full((120, 130, 3), colour, np.uint8)
    tier = "identity" if generator == "identity" else "severe"
    config = BlurConfig(
        generators={"linear" if generator == "identity" else generator: 1},
        photometry={
            "noise": {"shot": 0, "read": 0},
            "jpeg": {"probability": 0},
            "isp": {"share": 0},
            "trails": {"share": 1},
        },
        defocus={"share": 1},
        max_attempts=1,
    )
    pair = synthesize_pair(flat, (30, 20, 48), sample_rng(seed, 0, "flat", 0), config, tier=tier, flip=flip)
    assert np.array_equal(pair.blurry, pair.sharp)


def test_blur_is_a_convolution_of_linear_light_quantised_once(photo):
    config = quiet(generators={"gaussian_process": 1})
    pair = synthesize_pair(photo, (150, 170, 100), sample_rng(0, 0, "linear", 0), config, tier="severe")
    radius = pair.meta["kernel_size"] // 2
    window = photo[150 - radius : 250 + radius, 170 - radius : 270 + radius] / 255.0
    light = np.where(window <= 0.04045, window / 12.92, ((window + 0.055) / 1.055) ** 2.4)

    def convolved(image):
        out = np.zeros((100, 100, 3))
        for y, x in np.argwhere(pair.kernel > 0):
            out += pair.kernel[y, x] * image[2 * radius - y :, 2 * radius - x :][:100, :100]
        return out

    blurred = convolved(light)
    expected = 255 * np.where(blurred <= 0.0031308, 12.92 * blurred, 1.055 * blurred ** (1 / 2.4) - 0.055)
    assert np.abs(pair.blurry - expected).max() <= 0.55  # half a code, and the table's .05
    assert np.abs(convolved(window * 255) - expected).max() > 4  # blur of the codes themselves is another picture


def test_margin_comes_from_the_photo_and_is_reflected_only_where_it_ends(photo):
    config = quiet(generators={"gaussian_process": 1}, tiers={"severe": {"extent": [40, 40]}})
    whole = synthesize_pair(photo, (60, 80, 300), sample_rng(0, 0, "m", 0), config, tier="severe")
    part = synthesize_pair(photo, (110, 130, 100), sample_rng(0, 0, "m", 0), config, tier="severe")
    assert whole.meta["padded"] == part.meta["padded"] == 0
    assert np.abs(whole.blurry[50:150, 50:150].astype(int) - part.blurry).max() <= 1
    corner = synthesize_pair(photo, (0, 400, 100), sample_rng(0, 0, "m", 0), config, tier="severe")
    radius = corner.meta["kernel_size"] // 2
    assert corner.meta["padded"] == radius
    padded = np.pad(photo, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    inside = synthesize_pair(padded, (radius, 400 + radius, 100), sample_rng(0, 0, "m", 0), config, tier="severe")
    assert inside.meta["padded"] == 0
    assert np.array_equal(corner.blurry, inside.blurry)


@pytest.mark.parametrize("generator", GENERATORS)
def test_no_dark_borders_even_for_a_photo_no_larger_than_the_crop(generator):
    # A bright photo: any pixel that had been padded with black would darken the border.
    bright = np.maximum(texture(96, 96), 150)
    pair = synthesize_pair(
        bright, (0, 0, 96), sample_rng(3, 0, "b", 0), quiet(generators={generator: 1}), tier="extreme"
    )
    assert pair.meta["padded"] > 0
    # What `layers` paints behind its objects may vary by 20 codes.
    assert pair.blurry.min() >= (125 if generator == "layers" else 149)


def test_hopeless_crops_end_with_the_nearest_attempt():
    sky = np.full((200, 200, 3), (90, 130, 220), np.uint8)
    sky[::7, ::5] += 1
    config = quiet(max_attempts=5)
    pair = synthesize_pair(sky, (40, 40, 100), sample_rng(0, 0, "sky", 0), config, tier="severe")
    assert pair.meta["attempts"] == 5
    assert pair.meta["psnr_in_tier"] is False
    assert pair.meta["input_psnr"] > config.tiers.severe.psnr[1]


def test_a_pair_outside_its_psnr_range_is_drawn_again(photo):
    box, seed = (100, 100, 96), "00" * 16
    free = quiet(tiers={"severe": {"psnr": [0, 99]}})
    first = pair_from_seed(photo, box, seed, free, tier="severe").meta["input_psnr"]
    # A range just above the first attempt's value refuses that one.
    strict = quiet(tiers={"severe": {"psnr": [first + 0.01, 99]}}, max_attempts=20)
    again = pair_from_seed(photo, box, seed, strict, tier="severe")
    assert again.meta["attempt"] > 0
    assert again.meta["psnr_in_tier"] is True
    assert again.meta["input_psnr"] >= first + 0.01


def test_tiers_are_drawn_by_their_shares_and_extents_log_uniformly(photo):
    config = BlurConfig(generators={"linear": 1})
    plans = [plan_pair(photo, (0, 0, 32), sample_rng(0, 0, "t", i).bytes(16).hex(), config) for i in range(3000)]
    for tier, share in {"identity": 0.04, "mild": 0.06, "moderate": 0.25, "severe": 0.45, "extreme": 0.2}.items():
        assert np.mean([plan.tier == tier for plan in plans]) == pytest.approx(share, abs=0.03)
    metas = [pair_of_plan(plan).meta for plan in plans if plan.tier == "severe"][:300]
    place = np.sort([np.log(meta["extent"] / 30) / np.log(80 / 30) for meta in metas])
    assert place[0] >= 0
    assert place[-1] < 1
    assert np.abs(place - np.linspace(0, 1, len(place))).max() < 1.63 / np.sqrt(len(place))  # Kolmogorov, 1 %
    assert all(severity_of(meta["extent"]) == "severe" for meta in metas)


@pytest.mark.parametrize(
    ("extent", "tier"),
    [
        (0, "identity"),
        (0.1, "mild"),
        (14.999, "mild"),
        (15, "moderate"),
        (30, "severe"),
        (80, "extreme"),
        (500, "extreme"),
    ],
)
def test_severity_of_an_extent(extent, tier):
    assert severity_of(extent) == tier


def test_identity_adds_only_noise_and_jpeg(photo):
    pair = synthesize_pair(photo, (9, 8, 64), sample_rng(0, 0, "i", 0), quiet(), tier="identity")
    assert np.array_equal(pair.blurry, pair.sharp)
    assert pair.kernel.shape == (1, 1)
    assert pair.meta["extent"] == 0
    assert pair.meta["input_psnr"] == 100
    loud = BlurConfig(photometry={"curves": {"srgb": 1}, "jpeg": {"probability": 1}})
    pair = synthesize_pair(photo, (9, 8, 64), sample_rng(0, 0, "i", 0), loud, tier="identity")
    assert 20 < pair.meta["input_psnr"] < 60
    assert pair.meta["highlight_boost"] == 0


def test_highlights_draw_bright_streaks_that_clipping_had_hidden():
    night = np.zeros((200, 200, 3), np.uint8)
    night[99:101, 99:101] = 255
    plain = quiet(generators={"linear": 1}, tiers={"severe": {"extent": [40, 40], "psnr": [0, 99]}})
    boosted = plain.model_copy(
        update={"photometry": plain.photometry.model_copy(update={"highlight_boost": (4.0, 4.0)})}
    )
    dim, bright = (
        synthesize_pair(night, (50, 50, 100), sample_rng(0, 0, "n", 0), config, tier="severe").blurry
        for config in (plain, boosted)
    )
    linear = camera.decode(np.stack([dim, bright]), camera.response_curve("srgb"))
    assert linear[1].sum() / linear[0].sum() == pytest.approx(5, rel=0.1)


def test_noise_has_the_deviation_of_the_sensor_model():
    plane = np.full((300, 300), 0.3, np.float32)
    shot, read = 4e-4, 2e-3
    noise = camera.noise_indices(sample_rng(0, 0, "noise", 0), plane.shape)
    for gain in (1.0, 2.0):
        noisy = camera.add_sensor_noise(plane, gain, camera.Photometry(shot=shot, read=read), noise)
        expected = gain * np.sqrt(shot * 0.3 / gain + read**2)
        assert noisy.std() == pytest.approx(expected, rel=0.02)
        assert noisy.mean() == pytest.approx(0.3, abs=4 * expected / 300)


@pytest.mark.parametrize(
    ("curve", "parameter"), [("srgb", 0), ("gamma", 1.8), ("gamma", 2.6), ("exponential", 3), ("s_curve", 0.6)]
)
def test_response_curves_give_back_every_code_and_increase(curve, parameter):
    table = camera.response_curve(curve, float(parameter))
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    assert np.array_equal(camera.encode(camera.decode(codes, table), table), codes)
    assert np.all(np.diff(table.to_linear) > 0)
    assert table.to_linear[0] == 0
    assert table.to_linear[-1] == 1


@pytest.mark.parametrize("extent", CALIBRATION)
def test_input_psnr_at_an_extent_is_the_calibration_tables(tiles, extent):
    # The tiles are the sharpest cuts of their photographs, so they lie below whole photographs of 1280 px.
    srgb = camera.response_curve("srgb")
    values = []
    for i, tile in enumerate(tiles):
        path, _ = draw_path(sample_rng(0, extent, "calibration", i), "gaussian_process", MotionConfig())
        kernel = kernel_of_path(scale_to_extent(path, extent))
        radius = len(kernel) // 2
        blurry = camera.encode(convolve_valid(camera.decode(tile, srgb), kernel), srgb)
        values.append(psnr(blurry, np.ascontiguousarray(tile[radius:-radius, radius:-radius])))
    assert np.median(values) == pytest.approx(CALIBRATION[extent], abs=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"photo": np.zeros((50, 50), np.uint8)}, "RGB uint8"),
        ({"photo": np.zeros((50, 50, 3), np.float32)}, "RGB uint8"),
        ({"photo": "cat.jpg"}, "photo is str"),
        ({"box": (0, 0, 51)}, "does not lie in the photo"),
        ({"box": (-1, 0, 10)}, "does not lie in the photo"),
        ({"box": (0, 45, 10)}, "does not lie in the photo"),
        ({"box": (0, 0, 0)}, "crops are 8 px or more"),
        ({"box": (0, 0.5, 10)}, "whole numbers"),
        ({"tier": "huge"}, "tier 'huge'"),
        ({"masks": np.zeros((1, 4, 4), np.uint8)}, "masks are"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = {"photo": np.zeros((50, 50, 3), np.uint8), "box": (0, 0, 20), "tier": None, "masks": None, **change}
    with pytest.raises(ValueError, match=message) as caught:
        synthesize_pair(
            given["photo"],
            given["box"],
            sample_rng(0, 0, "e", 0),
            BlurConfig(),
            tier=given["tier"],
            masks=given["masks"],
        )
    assert "\n" not in str(caught.value)


def test_a_wrong_seed_is_named(photo):
    with pytest.raises(ValueError, match="32 hex digits"):
        pair_from_seed(photo, (0, 0, 20), "xyz", BlurConfig())
    with pytest.raises(ValueError, match="epoch -1"):
        sample_rng(0, -1, "a", 0)
