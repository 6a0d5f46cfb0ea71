"""Crops that grow over a run: resumed exactly on either side of a change, and no sample too small for a later one."""

import shutil

import pytest

from data.shards.set import ShardSet
from tests.train.weights import assert_same_weights
from train.config.patches import in_phase, phases
from train.config.schema import Config
from train.config.sources import pair_loader

pytestmark = pytest.mark.slow
GROWING = {
    "train__steps": 6,
    "train__progressive": "[{at: 2, crop: 96, batch: 2}, {at: 4, crop: 64, batch: 6}]",
    "checkpoint__every": 1,
    "checkpoint__keep": 6,
    "model__prior": "false",
}


@pytest.fixture(scope="module")
def grown(runs):
    out, _ = runs.run("grown", **GROWING)
    out = " ".join(out.split())
    for said in ("step 0: 4 pairs a step, crops of 64", "step 2: 2 pairs a step, crops of 96", "step 4: 6 pairs"):
        assert said in out
    return "grown"


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_resumed_near_a_change_equals_one_that_never_stopped(runs, grown, step):
    name = f"grown-{step}"
    shutil.copytree(runs.folder(grown), runs.folder(name))
    for later in range(step + 1, 7):
        shutil.rmtree(runs.folder(name) / f"checkpoints/step-{later:08d}")
    runs.run(name, "--resume", "auto", **GROWING)
    assert runs.losses(name) == runs.losses(grown)
    assert_same_weights(runs, name, grown, step=6, tolerance=0)


def test_a_sample_too_small_for_a_later_crop_is_told_before_the_first_step(runs):
    _, error = runs.run("small", status=1, **GROWING | {"train__progressive": "[{at: 5, crop: 4096}]"})
    assert "smaller than the crop of 4096 px" in error
    assert "lower train.progressive" in error


def test_no_pair_is_left_out_or_comes_twice_across_a_change(runs):
    config = Config.model_validate(
        {
            "data": {"crop": 64, "workers": 0, "margin": 16, "train": str(runs.train)},
            "model": {"prior": False},
            "train": {"steps": 5, "batch": 4, "progressive": [{"at": 2, "crop": 96, "batch": 2}]},
        }
    )
    sets, keys = [ShardSet(runs.train)], []
    for phase in phases(config):
        count = phase.last - phase.first
        for batch in pair_loader(in_phase(config, phase), sets, start=phase.start, batches=count, rank=0, world=1):
            assert batch["sharp"].shape[2:] == (phase.crop, phase.crop)
            assert len(batch["key"]) == phase.batch
            keys += batch["key"]
    whole = pair_loader(config, sets, start=0, batches=4, rank=0, world=1)
    assert keys == [key for batch in whole for key in batch["key"]][:14]
