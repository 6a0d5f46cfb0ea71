"""Exported programs: torch.export and ONNX give what the network gives, for pictures of any size; spandrel's too."""

import json

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.deblurrer import build_deblurrer
from model.pretrained import save_pretrained
from tests.model.models import SMALL
from train.checkpoint.program import _reason
from train.checkpoint.saved import load_model
from train.config.file import build_config

pytestmark = pytest.mark.slow
SIZES = ((97, 131), (64, 200), (34, 33))
NETWORKS = {
    "unet": {"name": "unet", "width": 8, "blocks": [1, 1]},
    "nafnet": {"name": "nafnet", **SMALL["nafnet"]},
    "uformer": {"name": "uformer", **SMALL["uformer"], "depths": [1, 1, 1, 1, 1, 1, 1, 1, 2]},
    "fftformer": {"name": "fftformer", **SMALL["fftformer"]},
}
RANDOM = {"weights": "random"}
PRIOR = {"student": {"name": "light", "width": 8}, "teacher": RANDOM, "levels": 2, "spe": {"dim": 8, "groups": 2}}


def model(folder, name: str):
    """An exported model file of random weights that does something."""
    backbone, *more = name.split("+")
    section = {"backbone": NETWORKS[backbone], "gate": "gate" in more}
    section |= PRIOR if "prior" in more else {"prior": False}
    network = build_deblurrer(ModelConfig(**section), seed=3, read_weights=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if not parameter.abs().sum():
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    config = build_config({"model": section}).model_dump(mode="json")
    save_pretrained(folder / "model.safetensors", network.state_dict(), config)
    return folder / "model.safetensors"


def expected(file, image):
    network, _, _ = load_model(file, torch.device("cpu"))
    with torch.no_grad():
        restored = network(image).restored[-1].clamp(0, 1)
    assert (restored - image).abs().max() > 0.02
    return restored


@pytest.mark.parametrize("name", ["unet", "nafnet", "unet+prior", "unet+gate", "unet+prior+gate"])
def test_programs_of_both_kinds_equal_the_network_at_any_size(sharpprior, tmp_path, name):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    file = model(tmp_path, name)
    for kind, suffix in (("torch", "pt2"), ("onnx", "onnx")):
        assert sharpprior("export", file, "-o", tmp_path / f"a.{suffix}", "--format", kind)[0] == 0
    program = torch.export.load(tmp_path / "a.pt2").module()
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    # Nothing of ours is in it: any program that knows ONNX runs it.
    assert {node.domain for node in onnx.load(tmp_path / "a.onnx").graph.node} <= {""}
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["sharpprior_model"])["backbone"]["name"] == name.partition("+")[0]
    for number, size in enumerate(SIZES):
        image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(number))
        wanted = expected(file, image)
        torch.testing.assert_close(program(image), wanted, rtol=0, atol=1e-4)
        (restored,) = session.run(["restored"], {"blurry": image.numpy()})
        np.testing.assert_allclose(restored, wanted.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["uformer", "fftformer"])
def test_networks_of_windows_and_of_spectra_are_programs_of_any_size_too(sharpprior, tmp_path, name):
    file = model(tmp_path, name)
    assert sharpprior("export", file, "-o", tmp_path / "a.pt2", "--format", "torch")[0] == 0
    program = torch.export.load(tmp_path / "a.pt2").module()
    for number, size in enumerate(SIZES):
        image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(number))
        torch.testing.assert_close(program(image), expected(file, image), rtol=0, atol=1e-4)


def test_onnx_without_what_a_network_computes_is_one_line(sharpprior, tmp_path):
    file = model(tmp_path, "fftformer")  # of complex numbers
    status, _, error = sharpprior("export", file, "-o", tmp_path / "a.onnx", "--format", "onnx")
    assert (status, len(error.strip().splitlines())) == (1, 1), error
    assert "cannot be written as ONNX (" in error
    assert "--format torch" in error
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (AssertionError(), "AssertionError"),
        (RuntimeError("\n\n  no such thing\nat all"), "RuntimeError: no such thing"),
        (ValueError("x" * 500), "ValueError: " + "x" * 200),
    ],
)
def test_an_exporter_s_error_is_its_root_in_one_line(error, told):
    outer = OSError("pages\nof\nadvice")
    outer.__cause__ = error
    assert _reason(outer) == told


def test_spandrel_loads_what_is_exported_for_it_and_so_do_we(sharpprior, tmp_path):
    spandrel = pytest.importorskip("spandrel")
    from train.restore.spandrel import register

    file, other = model(tmp_path, "unet+prior"), tmp_path / "for_spandrel.safetensors"
    assert sharpprior("export", file, "-o", other, "--format", "spandrel")[0] == 0
    register()
    register()
    described = spandrel.ModelLoader().load_from_file(other)
    assert (described.architecture.id, described.scale, described.input_channels) == ("sharpprior", 1, 3)
    assert set(described.tags) == {"unet", "prior"}
    image = torch.rand(1, 3, 70, 90)
    with torch.no_grad():
        torch.testing.assert_close(described(image).clamp(0, 1), expected(file, image), rtol=0, atol=1e-6)
    torch.testing.assert_close(expected(other, image), expected(file, image), rtol=0, atol=0)


def test_mistakes_of_export_are_one_line(sharpprior, tmp_path):
    file = model(tmp_path, "unet")
    (tmp_path / "taken.onnx").write_text("")
    for arguments, words in (
        (["-o", tmp_path / "a.onnx", "--format", "onx"], "did you mean onnx?"),
        (["-o", tmp_path / "a.pt", "--format", "torch"], "ends in .pt2"),
        (["-o", tmp_path / "taken.onnx", "--format", "onnx"], "--overwrite"),
        (["-o", tmp_path / "a.onnx", "--format", "onnx", "--prior"], "--prior"),
        (["-o", tmp_path / "a.onnx", "--format", "onnx", "--dtype", "bf16"], "fp32"),
    ):
        status, _, error = sharpprior("export", file, *arguments)
        assert (status, len(error.strip().splitlines())) == (1, 1), error
        assert words in error
