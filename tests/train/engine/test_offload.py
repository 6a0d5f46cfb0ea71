"""Optimizer state and parameters in host memory: the losses, averages and checkpoints of a run without offloading.

DeepSpeed compiles its AdamW for the CPU at the first use, about a minute; later ones find it.
"""

import fcntl
import os
import shutil
import tempfile

import pytest
import torch
from safetensors.torch import load_file

from train.config.schema import Config
from train.engine.host_adam import _extensions, _reason
from train.engine.settings import deepspeed_settings

compiles = pytest.mark.skipif(
    not (shutil.which("ninja") and (shutil.which("c++") or os.environ.get("CXX"))),
    reason="DeepSpeed's CPU Adam needs ninja and a C++ compiler, and one of them is not here",
)
CHANGES = {"train__steps": 6, "train__distill_steps": 2, "checkpoint__every": 3}
BOTH = {"engine__zero": 3, "engine__offload": "cpu", "engine__offload_parameters": "cpu"}


@pytest.fixture(scope="module")
def plain(runs) -> dict[int, float]:
    """Losses of one process without ZeRO."""
    runs.run("in-place", **CHANGES)
    return runs.losses("in-place")


def furthest(one: dict[int, float], other: dict[int, float]) -> float:
    assert list(one) == list(other)
    return max(abs(one[step] - other[step]) for step in one)


@compiles
@pytest.mark.parametrize(
    "engine",
    [{"engine__zero": 1, "engine__offload": "cpu"}, {"engine__zero": 2, "engine__offload": "cpu"}, BOTH],
    ids=["optimizer-zero1", "optimizer-zero2", "both-zero3"],
)
def test_offloading_changes_no_loss(runs, plain, engine):
    name = "-".join(map(str, engine.values()))
    runs.run(name, ranks=2, **CHANGES, **engine)
    assert furthest(plain, runs.losses(name)) < 1e-4
    plain_average, average = (
        load_file(runs.folder(each) / "checkpoints/step-00000006/model.safetensors") for each in ("in-place", name)
    )
    # The mean: Adam makes whole steps of what rounding leaves of a gradient of zero. Another Adam differs by 3e-4.
    apart = torch.cat([(value.double() - average[key].double()).flatten() for key, value in plain_average.items()])
    assert apart.abs().mean() < 2e-5


@compiles
def test_a_run_that_offloads_resumes_exactly_and_elsewhere(runs):
    runs.run("offloaded", ranks=2, **CHANGES, **BOTH)
    for name, ranks, engine, allowed in (("again", 2, BOTH, 0.0), ("elsewhere", 1, {"engine__zero": 1}, 1e-5)):
        shutil.copytree(runs.folder("offloaded"), runs.folder(name))
        shutil.rmtree(runs.folder(name) / "checkpoints/step-00000006")
        runs.run(name, "--resume", "auto", ranks=ranks, **CHANGES, **engine)
        assert furthest(runs.losses("offloaded"), runs.losses(name)) <= allowed, name


def test_a_killed_build_leaves_no_lock_and_builds_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    with _extensions("versions"):
        folder = os.environ["TORCH_EXTENSIONS_DIR"]
        os.mkdir(f"{folder}/cpu_adam")
        open(f"{folder}/cpu_adam/lock", "w").close()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ
    with _extensions("versions"):
        assert os.environ["TORCH_EXTENSIONS_DIR"] == folder
        assert not os.path.exists(f"{folder}/cpu_adam/lock")
        with open(f"{folder}/building") as another, pytest.raises(BlockingIOError):
            fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with _extensions("other versions"):
        assert os.environ["TORCH_EXTENSIONS_DIR"] != folder
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "mine")
    with _extensions("versions"):
        assert os.environ["TORCH_EXTENSIONS_DIR"] == "mine"


def test_a_folder_that_others_may_write_or_repoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    own = tmp_path / f"sharpprior-extensions-{os.getuid()}"
    own.mkdir()
    own.chmod(0o777)
    with pytest.raises(PermissionError, match="not a folder of yours alone"), _extensions("versions"):
        pass
    own.rmdir()
    own.symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="not a folder of yours alone"), _extensions("versions"):
        pass
    own.unlink()
    with _extensions("versions"):
        assert own.stat().st_mode & 0o777 == 0o700
    assert os.environ["TORCH_EXTENSIONS_DIR"] == ""


def test_what_began_a_failed_build_is_told():
    error = RuntimeError("cpu_adam failed to load")
    error.__cause__ = RuntimeError("ninja: failed\nx.cpp:3: error: no such thing\n")
    assert _reason(error) == "x.cpp:3: error: no such thing"


def test_accelerate_keeps_the_optimizer_that_it_is_given():
    offload = Config(engine={"zero": 2, "offload": "cpu"})
    assert deepspeed_settings(offload, 1)["zero_force_ds_cpu_optimizer"] is False
    with pytest.raises(ValueError, match="set by the configuration"):
        deepspeed_settings(Config(engine={"deepspeed": {"zero_force_ds_cpu_optimizer": True}}), 1)
