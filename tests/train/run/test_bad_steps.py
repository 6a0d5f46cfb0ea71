"""Losses and gradients that are not finite: no weight moves, the batch is on file, too many end the run."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.train.ranks import start_ranks
from train.run.bad_steps import BadSteps, DivergedError
from train.run.step import StepResult


@pytest.fixture(scope="module")
def seen(tmp_path_factory, runs) -> list[list[dict]]:
    """What two ranks saw of every case, under every ZeRO stage."""
    folder = tmp_path_factory.mktemp("bad-gradients")
    script = Path(__file__).parents[1] / "workers" / "bad_gradients.py"
    ranks = start_ranks([sys.executable, str(script), str(folder)], 2, runs.environment())
    for rank in ranks:
        out, error = rank.communicate(timeout=240)
        assert rank.returncode == 0, out[-2000:] + error[-3000:]
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ["gradient", "loss"])
def test_no_weight_moves_on_any_rank_under_any_stage(seen, case):
    both = [row for rows in seen for row in rows if row["case"] == case]
    assert len(both) == 10
    for row in both:
        assert not row["finite"], row
        assert not row["moved"], row


def test_training_goes_on_after_bad_steps_alike_on_all_ranks(seen):
    for zero, one in zip(*seen, strict=True):
        assert zero["weights"] == one["weights"]
        if zero["case"] == "good":
            assert zero["finite"], zero
            assert zero["moved"], zero
            assert zero["not_finite"] == []


def test_what_was_not_finite_is_said_where_it_was(seen):
    for rank, rows in enumerate(seen):
        for row in rows:
            if row["case"] == "gradient":
                assert row["not_finite"] == ["gradients"]
            if row["case"] == "loss":
                assert row["not_finite"] == (["loss", "pixel"] if rank == 1 else [])
            assert row["keys"] == [[f"{row['case']}-{rank}"]]


def step(finite: bool) -> StepResult:
    batch = {"key": ["photo_7"], "box": torch.tensor([[1, 2, 64]]), "epoch": torch.tensor([3]),
             "position": torch.tensor([41])}  # fmt: skip
    return StepResult(
        loss=1.0, parts={}, lr=1e-3, grad_norm=None, finite=finite, wait_s=0.0, total_s=1.0,
        not_finite=[] if finite else ["gradients"], batches=[batch],
    )  # fmt: skip


def test_bad_steps_in_a_row_end_the_run_and_are_on_file(tmp_path):
    bad = BadSteps(tmp_path, 5, limit=3)
    assert [bad.check(number, step(finite)) for number, finite in enumerate([False, False, True, False, False])] == [
        True, True, False, True, True,
    ]  # fmt: skip
    with pytest.raises(DivergedError, match=r"in 3 steps in a row \(last: step 5, gradients\).*optim\.lr.*photo_7"):
        bad.check(5, step(False))
    records = [json.loads(line) for line in (tmp_path / "nonfinite-rank5.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 3, 4, 5]
    assert records[-1]["not_finite"] == ["gradients"]
    assert records[-1]["batches"] == [{"key": ["photo_7"], "box": [[1, 2, 64]], "epoch": [3], "position": [41]}]


def scattered(bad: BadSteps, apart: int) -> None:
    """One bad step among `apart`, for 6000 steps."""
    for number in range(0, 6000, apart):
        bad.check(number, step(False))
        bad.check(number + 1, step(True))


def test_bad_steps_scattered_over_a_thousand_end_the_run_too(tmp_path):
    scattered(BadSteps(tmp_path, 0, limit=2), apart=60)  # 17 among a thousand
    with pytest.raises(DivergedError, match="in 20 of the last 1000 steps"):
        scattered(BadSteps(tmp_path, 0, limit=2), apart=50)
