"""Progressive patches: which steps have which crops, and where the stream goes on."""

import pytest

from train.config.patches import dearest, largest_crop, pairs_before, phase_at, phases
from train.config.schema import Config


def config(**train) -> Config:
    return Config.model_validate({"data": {"crop": 64}, "model": {"prior": False}, "train": {"batch": 8, **train}})


LATER = [{"at": 3, "crop": 96, "batch": 4}, {"at": 5, "crop": 128, "batch": 2}]


def test_phases_follow_each_other_without_a_gap_in_steps_or_pairs():
    run = config(steps=9, progressive=LATER)
    assert [(p.first, p.last, p.start, p.crop, p.batch) for p in phases(run)] == [
        (0, 3, 0, 64, 8),
        (3, 5, 24, 96, 4),
        (5, 9, 32, 128, 2),
    ]
    assert [pairs_before(run, step) for step in range(10)] == [0, 8, 16, 24, 28, 32, 34, 36, 38, 40]
    assert [phase_at(run, step).crop for step in (0, 2, 3, 4, 5, 9)] == [64, 64, 96, 96, 128, 128]
    assert largest_crop(run) == 128
    assert dearest(run).crop == 96  # 4·96² pixels are more than 8·64² and 2·128²


def test_one_phase_without_progressive_and_none_after_the_end():
    assert [(p.first, p.last) for p in phases(config(steps=4))] == [(0, 4)]
    assert pairs_before(config(steps=4), 4) == 32
    assert [p.last for p in phases(config(steps=4, progressive=LATER))] == [3, 4]


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"progressive": LATER[::-1]}, "must rise"),
        ({"progressive": [{"at": 2, "crop": 96, "batch": 3}], "accumulation": 2}, "does not divide batch 3"),
        ({"progressive": [{"at": 0, "crop": 96}]}, "greater than or equal to 1"),
    ],
)
def test_phases_that_cannot_be_are_refused(train, said):
    with pytest.raises(ValueError, match=said):
        config(steps=9, **train)


def test_every_batch_must_divide_among_the_ranks():
    run = config(steps=9, progressive=LATER)
    assert run.micro_batch(2) == 4
    with pytest.raises(ValueError, match=r"train\.progressive: batch 2 is not divisible by 4 ranks"):
        run.micro_batch(4)


def test_cached_features_and_changing_crops_exclude_each_other():
    with pytest.raises(ValueError, match=r"set features\.cache to off"):
        Config.model_validate({"features": {"cache": "auto"}, "train": {"progressive": LATER}})
