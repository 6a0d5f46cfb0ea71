"""Whole runs with replayed passes have the losses and weights of eager ones, bit for bit, and go on so."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.train.runs import Runs
from tests.train.weights import assert_same_weights

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parents[1] / "workers" / "graphed_run.py"
STEPS = 10
# Two stages, each long enough for eager calls and replays.
SETTINGS = {"train__steps": STEPS, "train__distill_steps": 5, "checkpoint__every": 4, "eval__enabled": False}
LINES = ("network: replayed as CUDA graphs", "teacher: replayed as CUDA graphs")


def graphed(runs: Runs, name: str, *arguments: str, ranks: int = 1, **changes) -> str:
    """Run to the end with the stand-in; what it logged."""
    command = runs.command(name, *arguments, ranks=ranks, engine__graphs="on", **changes)
    main = next(n for n, word in enumerate(command) if word.endswith("main.py"))
    command[main] = str(WORKER)
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return (runs.folder(name) / "log.txt").read_text()


def test_losses_and_weights_are_the_same_bits(runs):
    settings = SETTINGS | {"train__accumulation": 2, "engine__precision": "bf16", "model__gate": True}
    runs.run("eager", **settings)
    log = graphed(runs, "replayed", **settings)
    assert [log.count(line) for line in LINES] == [2, 1]  # one a stage; the teacher's crops stay as they are
    assert runs.losses("replayed") == runs.losses("eager")
    assert_same_weights(runs, "replayed", "eager", STEPS, tolerance=0)


def test_a_run_that_is_resumed_goes_on_with_the_same_bits_and_says_what_its_steps_cost(runs):
    log = graphed(runs, "whole", profile__step=9, profile__steps=2, **SETTINGS)
    for stage in ("distill", "deblur"):
        assert f"forward pass, stage {stage}: student " in log
    assert (runs.folder("whole") / "profile" / "step-9.json.gz").exists()
    steps = {record["step"]: record for record in runs.records("whole") if "loss" in record}
    assert steps[1]["tflops"] > 0
    assert all(record["pairs_per_s"] == pytest.approx(4 / record["seconds"]) for record in steps.values())
    flops = {number: record["tflops"] * record["seconds"] for number, record in steps.items()}
    assert flops[6] > 1.2 * flops[5] == pytest.approx(1.2 * flops[1])
    assert "mfu" not in steps[1]
    assert ["forward" in steps[number]["shares"] for number in (3, 4, 8, 9)] == [False, True, False, True]
    shutil.copytree(runs.folder("whole"), runs.folder("again"))
    shutil.rmtree(runs.folder("again") / f"checkpoints/step-{STEPS:08d}")
    graphed(runs, "again", "--resume", "auto", **SETTINGS)
    assert runs.losses("again") == runs.losses("whole")
    assert_same_weights(runs, "again", "whole", STEPS, tolerance=0)


def test_what_forbids_graphs_is_told_before_the_first_step(runs):
    _, error = runs.run("no-gpu", status=1, engine__graphs="on")
    assert "engine.graphs on: CUDA graphs need a GPU" in error


@pytest.mark.parametrize("rests", [False, True])
def test_a_prior_that_rests_and_learns_again_is_captured_anew(runs, rests):
    settings = SETTINGS | {"train__steps": 14, "train__distill_steps": 4, "train__spe_steps": 5}
    settings |= {"train__student_frozen": rests}
    runs.run(f"rests-{rests}-off", **settings)
    log = graphed(runs, f"rests-{rests}-on", **settings)
    assert log.count(LINES[0]) == 3  # one a stage, each with others that learn
    assert runs.losses(f"rests-{rests}-on") == runs.losses(f"rests-{rests}-off")
    assert_same_weights(runs, f"rests-{rests}-on", f"rests-{rests}-off", 14, tolerance=0)
