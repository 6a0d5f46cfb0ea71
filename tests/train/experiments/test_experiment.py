"""`sharpprior experiment` as a user runs it: to the end, after a kill, with photographs of one's own, and refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.train.runs import ROOT, TINY, Runs
from tests.train.small_sets import small_set
from train.restore.restorer import Restorer

pytestmark = pytest.mark.slow
ARMS = {
    "bare": {"set": {"model.prior": False}},
    "plugged": {"prior": "taught"},
    "oracle": {"set": {"model.oracle": True, "train.student_frozen": True}},
}


def plain(value: object) -> object:
    return yaml.safe_load(value) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, runs: Runs) -> Path:
    """A file of two arms and one seed, on the tests' small set."""
    folder = tmp_path_factory.mktemp("experiment")
    shared = {key: plain(value) for key, value in TINY.items() if key != "run.seed"}
    shared |= {"data.train": str(runs.train), "data.val": str(runs.val), "train.steps": 4, "checkpoint.every": 1}
    shared |= {"eval.per_tier": 1}
    (folder / "base.yaml").write_text("{}\n")
    file = folder / "two.yaml"
    taught = {"taught": {"set": {"train.distill_steps": 4, "eval.enabled": False}}}
    written = {"title": "Two", "config": "base.yaml", "set": shared, "seeds": [1], "first": taught, "arms": ARMS}
    written["oracle"] = "oracle"
    file.write_text(yaml.safe_dump(written))
    return file


def start(runs: Runs, file: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "train.cli", "experiment", str(file), "--root", str(file.parent / "runs")]
    command += ["-o", str(file.parent / "docs"), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def run(runs: Runs, file: Path, *arguments: str, status: int = 0) -> str:
    process = start(runs, file, *arguments)
    out, error = process.communicate(timeout=400)
    assert process.returncode == status, out[-2000:] + error[-2000:]
    return out + error


def test_an_experiment_that_is_killed_goes_on_and_is_written_up(runs, experiment):
    folder = experiment.parent / "runs" / "two"
    process = start(runs, experiment)
    metrics = folder / "bare-seed1" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    taught = (folder / "taught-seed1" / "metrics.jsonl").read_text()
    said = run(runs, experiment)
    assert "plugged-seed1: training" in said
    assert "taught-seed1: training" not in said
    assert (folder / "taught-seed1" / "metrics.jsonl").read_text() == taught
    losses = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["step"] for record in losses if "loss" in record] == [1, 2, 3, 4]
    report = (experiment.parent / "docs" / "two.md").read_text()
    assert "Not finished" not in report
    assert "* **plugged** against bare: severe: " in report
    assert (experiment.parent / "docs" / "two.png").exists()
    again = run(runs, experiment, "--list")
    assert [line.split(": ")[1] for line in again.splitlines() if "-seed" in line] == ["finished"] * 4
    assert "holds a run with other settings" in run(runs, experiment, "--set", "optim.lr=5e-4", status=1)
    assert "eval.crop 64 → 96" in run(runs, experiment, "--set", "eval.crop=96", status=1)
    with pytest.raises(ValueError, match="a bound for studies, which restores nothing"):
        Restorer.load(folder / "oracle-seed1", device="cpu")
    others = small_set(experiment.parent / "others", "train", 3)
    assert "training photographs" in run(runs, experiment, "--set", f"data.train={others}", status=1)
    state = folder / "plugged-seed1" / "checkpoints" / "step-00000004" / "run.json"
    facts = json.loads(state.read_text())
    facts["origins"]["prior"]["digest"] = "of another prior"
    state.write_text(json.dumps(facts))
    assert "plugged-seed1: holds a run with other settings (prior)" in run(runs, experiment, "--list", status=1)


def test_validation_pictures_among_the_training_ones_are_refused(runs, experiment, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(runs.train, photos / "train")
    shutil.copytree(runs.train, photos / "val")
    said = run(runs, experiment, "--photos", str(photos), "--list", status=1)
    assert "shows what validation picture" in said
    assert "no such folder: --photos needs train/ and val/" in run(
        runs, experiment, "--photos", str(tmp_path), "--list", status=1
    )
