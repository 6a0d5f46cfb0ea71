"""Ranks, ZeRO stages, accumulation and precision change who computes, not what is learned."""

import shutil

import pytest
from weights import assert_same_weights


@pytest.fixture(scope="session")
def one_process(runs) -> str:
    """The reference of the ranks: 6 steps in one process without ZeRO, in two micro-batches."""
    runs.run("one", train__steps=6, train__distill_steps=2, checkpoint__every=3)
    return "one"


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_ranks_under_zero_have_the_losses_of_one_process(runs, one_process, zero):
    name = f"zero{zero}"
    settings = {"train__steps": 6, "train__distill_steps": 2, "checkpoint__every": 3, "engine__zero": zero}
    runs.run(name, ranks=2, **settings)
    expected, found = runs.losses(one_process), runs.losses(name)
    assert found.keys() == expected.keys()
    for step in expected:
        assert found[step] == pytest.approx(expected[step], abs=1e-4), step
    assert_same_weights(runs, name, one_process, 6, tolerance=2e-3)
    one, two = (
        next(r for r in runs.records(n) if r["step"] == 6 and "tiers" in r)["tiers"] for n in (one_process, name)
    )
    assert [row["pairs"] for row in one] == [row["pairs"] for row in two]
    for a, b in zip(one, two, strict=True):
        assert a["restored_psnr"] == pytest.approx(b["restored_psnr"], abs=0.02)


def test_zero_3_on_two_ranks_resumes_bit_identically(runs, one_process):
    settings = {"train__steps": 6, "train__distill_steps": 2, "checkpoint__every": 3, "engine__zero": 3}
    if not runs.folder("zero3").exists():
        runs.run("zero3", ranks=2, **settings)
    before = runs.losses("zero3")
    folder = runs.folder("zero3again")
    shutil.copytree(runs.folder("zero3"), folder)
    shutil.rmtree(folder / "checkpoints/step-00000006")
    runs.run("zero3again", "--resume", "auto", ranks=2, **settings)
    assert runs.losses("zero3again") == before
    assert_same_weights(runs, "zero3again", "zero3", 6, tolerance=0)


def test_accumulation_changes_nothing(runs, one_process):
    runs.run("accumulated", train__steps=6, train__distill_steps=2, train__accumulation=2, checkpoint__every=3)
    expected, found = runs.losses(one_process), runs.losses("accumulated")
    for step in expected:
        assert found[step] == pytest.approx(expected[step], abs=1e-4), step


def test_bf16_autocast_trains(runs):
    runs.run("bf16", train__steps=2, engine__precision="bf16", engine__zero=2, data__workers=0)
    assert all(0 < loss < 2 for loss in runs.losses("bf16").values())
