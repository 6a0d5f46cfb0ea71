"""Optimizer state and parameters in host memory: the losses, averages and checkpoints of a run without offloading."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from train.config.schema import Config
from train.engine.settings import deepspeed_settings

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


def test_a_run_that_offloads_resumes_exactly_and_elsewhere(runs):
    runs.run("offloaded", ranks=2, **CHANGES, **BOTH)
    # Names of this file's own: all files of the session keep their runs in one folder.
    cases = (("offloaded-again", 2, BOTH, 0.0), ("offloaded-elsewhere", 1, {"engine__zero": 1}, 1e-5))
    for name, ranks, engine, allowed in cases:
        shutil.copytree(runs.folder("offloaded"), runs.folder(name))
        shutil.rmtree(runs.folder(name) / "checkpoints/step-00000006")
        runs.run(name, "--resume", "auto", ranks=ranks, **CHANGES, **engine)
        assert furthest(runs.losses("offloaded"), runs.losses(name)) <= allowed, name


def test_accelerate_keeps_the_optimizer_that_it_is_given():
    offload = Config(engine={"zero": 2, "offload": "cpu"})
    assert deepspeed_settings(offload, 1)["zero_force_ds_cpu_optimizer"] is False
    with pytest.raises(ValueError, match="set by the configuration"):
        deepspeed_settings(Config(engine={"deepspeed": {"zero_force_ds_cpu_optimizer": True}}), 1)
