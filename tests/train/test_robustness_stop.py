"""Asking a run to stop, from anywhere and at any moment: all ranks save the same step, say so, and exit 0."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ENDLESS = {"train__steps": 5000, "checkpoint__every": 5000}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            out, error = process.communicate()
            pytest.fail(f"never came\n{out[-2000:]}\n{error[-2000:]}")
        time.sleep(0.02)


def steps_done(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


def stopped(folder: Path, process: subprocess.Popen) -> dict:
    """The marker of a run that ended as it was asked to; its checkpoint is there."""
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error[-3000:]
    marker = json.loads((folder / "STOPPED").read_text())
    assert not (folder / "STOP").exists()
    assert (folder / f"checkpoints/step-{marker['step']:08d}/run.json").exists()
    assert (folder / "checkpoints/latest").read_text() == f"step-{marker['step']:08d}\n"
    assert "Traceback" not in error
    return marker


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_to_every_process_saves_and_marks(runs, name):
    """To the whole group, loader workers included, as SLURM and torchrun send it."""
    process = runs.start(f"by-{name}", data__workers=2, start_new_session=True, **ENDLESS)
    folder = runs.folder(f"by-{name}")
    wait_for(lambda: steps_done(folder) >= 2, process)
    os.killpg(process.pid, getattr(signal, name))
    marker = stopped(folder, process)
    assert marker["reason"] == name
    assert marker["step"] == steps_done(folder)
