"""`sharpprior export`: files that load without DeepSpeed and without the run, with the run's own outputs."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.train.runs import ROOT
from train.checkpoint.manifest import damage
from train.checkpoint.saved import load_model
from train.cli.app import app
from train.config.file import load_config
from train.config.networks import build_model

WITHOUT_ENGINE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("deepspeed", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, sys.argv[1])
import torch
from train.checkpoint.saved import load_model
network, config, _ = load_model(sys.argv[2], torch.device("cpu"))
image = torch.load(sys.argv[3])
with torch.no_grad():
    torch.save([network(image).restored[-1], config.train.steps], sys.argv[4])
"""


def exported(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def outputs(runs, unbroken, tmp_path_factory):
    """A picture, and what the run's averaged weights make of it, without our loading code."""
    folder = runs.folder(unbroken)
    network = build_model(load_config(folder / "config.yaml"), read_weights=False)
    with safe_open(folder / "checkpoints/step-00000012/model.safetensors", framework="pt") as file:
        network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no dictionary)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    path = tmp_path_factory.mktemp("outputs") / "image.pt"
    torch.save(image, path)
    with torch.no_grad():
        return path, network.eval()(image).restored[-1]


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_it_loads_without_deepspeed_and_restores_the_same(runs, unbroken, outputs, tmp_path, name):
    image, expected = outputs
    target = tmp_path / "new" / name
    assert "step 12" in exported(runs.folder(unbroken), "-o", target)
    result = tmp_path / "result.pt"
    command = [sys.executable, "-c", WITHOUT_ENGINE, str(ROOT), str(target), str(image), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=runs.environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    restored, steps = torch.load(result)
    torch.testing.assert_close(restored, expected, rtol=0, atol=1e-6)
    assert steps == 12


def test_bf16_is_half_the_size_and_close(runs, unbroken, outputs, tmp_path):
    image, expected = outputs
    exported(runs.folder(unbroken), "-o", tmp_path / "half.safetensors", "--dtype", "bf16")
    exported(runs.folder(unbroken), "-o", tmp_path / "whole.safetensors")
    half, whole = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "whole"))
    assert half < 0.6 * whole
    network, _, _ = load_model(tmp_path / "half.safetensors", torch.device("cpu"))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    with torch.no_grad():
        assert (network(torch.load(image)).restored[-1] - expected).abs().max() < 0.02


def test_an_older_step_can_be_chosen_and_an_export_exported(runs, unbroken, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two"
    assert "step 6" in exported(runs.folder(unbroken), "-o", one, "--checkpoint", "step-6")
    exported(one, "-o", two)
    first = load_model(one, torch.device("cpu"))[0].state_dict()
    second = load_model(two, torch.device("cpu"))[0].state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name])


def test_wrong_targets_are_one_line_each(runs, unbroken, tmp_path):
    run = runs.folder(unbroken)
    target = tmp_path / "model.safetensors"
    exported(run, "-o", target)
    checkpoint = run / "checkpoints" / "step-00000012"
    for arguments, words in (
        ((run, "-o", target), "exists: .*--overwrite"),
        ((run, "-o", tmp_path / "model.pt"), "ends in .safetensors"),
        ((run, "-o", tmp_path / "x", "--dtype", "fp8"), "fp32 or bf16"),
        ((run, "-o", checkpoint, "--overwrite"), "would damage a checkpoint"),
        ((run, "-o", checkpoint / "x.safetensors"), "would damage a checkpoint"),
        ((run, "-o", run, "--overwrite"), "taken for the run's newest model"),
        ((run, "-o", run / "model.safetensors"), "taken for the run's newest model"),
        ((target, "-o", target, "--overwrite"), "is the model itself"),
        ((run, "-o", tmp_path / "y", "--checkpoint", "step-7"), "no checkpoint step-7"),
        ((tmp_path / "none.safetensors", "-o", tmp_path / "y"), "no such run"),
    ):
        with pytest.raises(ValueError, match=words):
            exported(*arguments)
    assert damage(checkpoint) is None
    exported(run, "-o", target, "--overwrite")


def test_a_file_of_somebody_else_is_said(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not written by this program"):
        load_model(tmp_path / "other.safetensors", torch.device("cpu"))
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path / "torn.safetensors", torch.device("cpu"))


def test_without_paths_nothing_names_a_folder_and_it_loads(runs, unbroken, outputs, tmp_path):
    image, expected = outputs
    folder, file = runs.folder(unbroken), tmp_path / "m.safetensors"
    exported(folder, "-o", file)
    assert str(runs.root).encode() in file.read_bytes()
    exported(folder, "-o", file, "--no-paths", "--overwrite")
    assert str(runs.root).encode() not in file.read_bytes()
    network, config, _ = load_model(file, torch.device("cpu"))
    assert (config.run.root, config.data.train, config.data.val) == ("runs", None, None)
    with torch.no_grad():
        assert torch.equal(network(torch.load(image)).restored[-1], expected)
