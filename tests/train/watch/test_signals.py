"""Asking a run to stop, from anywhere and at any moment: all ranks save the same step, say so, and exit 0."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.ranks import ROOT, start_ranks
from train.watch.signals import REASONS, StopRequest
from train.watch.signals import StoppedEarly as StoppedEarlyError

pytestmark = pytest.mark.slow

ENDLESS = {"model__prior": "false", "train__steps": 5000, "checkpoint__every": 5000}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            out, error = process.communicate()
            pytest.fail(f"never came\n{out[-2000:]}\n{error[-2000:]}")
        time.sleep(0.02)


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def steps_done(folder: Path) -> int:
    return text(folder / "metrics.jsonl").count('"loss"')


def stopped(folder: Path, *processes: subprocess.Popen, saved: bool = True) -> dict:
    """The marker of a run that ended as it was asked to; its checkpoint is there."""
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error[-3000:]
        assert "Traceback" not in error
    marker = json.loads((folder / "STOPPED").read_text())
    assert not (folder / "STOP").exists()
    if saved:
        assert (folder / f"checkpoints/step-{marker['step']:08d}/run.json").exists()
        assert (folder / "checkpoints/latest").read_text() == f"step-{marker['step']:08d}\n"
    return marker


def test_a_signal_to_every_process_saves_and_marks(runs):
    """To the whole group, loader workers included, as SLURM and torchrun send it."""
    folder = runs.folder("by-signal")
    process = runs.start("by-signal", data__workers=2, start_new_session=True, **ENDLESS)
    wait_for(lambda: steps_done(folder) >= 2, process)
    os.killpg(process.pid, signal.SIGUSR2)
    marker = stopped(folder, process)
    assert marker == {"step": steps_done(folder), "reason": "SIGUSR2"}


def test_the_file_stop_stops_all_ranks_at_the_same_step(runs):
    folder = runs.folder("by-file")
    ranks = start_ranks(runs.command("by-file", data__workers=0, **ENDLESS), 2, runs.environment())
    wait_for(lambda: steps_done(folder) >= 2, ranks[0])
    (folder / "STOP").touch()
    marker = stopped(folder, *ranks)
    assert marker == {"step": steps_done(folder), "reason": "file STOP"}


def test_an_evaluation_is_broken_off_and_made_up_for(runs):
    folder, settings = runs.folder("evaluating"), {"model__prior": "false", "data__workers": 0, "train__steps": 1}
    process = runs.start("evaluating", eval__per_tier=2000, **settings)
    wait_for(lambda: "health: " in text(folder / "log.txt"), process)
    time.sleep(0.5)  # into the evaluation before the first step, of 20,000 pairs
    process.send_signal(signal.SIGTERM)
    assert stopped(folder, process) == {"step": 0, "reason": "SIGTERM"}
    assert text(folder / "metrics.jsonl") == ""
    (folder / "STOP").touch()  # left over: a starting run does not stop at it
    runs.run("evaluating", "--resume", "auto", **settings)
    assert [record["step"] for record in runs.records("evaluating") if "tiers" in record] == [0, 1]
    assert not (folder / "STOP").exists()
    assert not (folder / "STOPPED").exists()


def test_a_signal_before_training_ends_cleanly(runs):
    folder = runs.folder("starting")
    process = runs.start("starting", data__workers=0, **ENDLESS)
    wait_for(lambda: "training data" in text(folder / "log.txt"), process)
    process.send_signal(signal.SIGUSR1)
    assert stopped(folder, process, saved=False)["reason"] == "SIGUSR1"


def test_every_reason_reaches_all_ranks_and_the_first_counts():
    for number, name in [(getattr(signal, name), name) for name in REASONS[:4]]:
        one, other = StopRequest(), StopRequest()
        for stop in (one, other):
            stop.begin(0)
        other._on_signal(number, None)
        sums = [a + b for a, b in zip(one.flags(), other.flags(), strict=True)]
        for stop in (one, other):
            assert stop.agreed is None
            stop.take(sums)
            assert stop.agreed == name
            stop.take([1.0] * len(REASONS))
            assert stop.agreed == name


def test_a_signal_during_the_imports_ends_cleanly():
    command = [sys.executable, "train/main.py", "--config", "nowhere.yaml"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    bit = 1 << (signal.SIGTERM - 1)
    wait_for(lambda: int(text(Path(f"/proc/{process.pid}/status")).split("SigCgt:")[1].split()[0], 16) & bit, process)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120)[1] == "SIGTERM: stopped before training began\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, StoppedEarlyError)]
)
def test_before_training_a_signal_interrupts(number, raised):
    stop = StopRequest()
    stop._on_signal(number, None)  # imports go on
    with pytest.raises(raised):
        stop.heed()
    stop = StopRequest()
    stop.heed()
    with pytest.raises(raised):
        stop._on_signal(number, None)
    stop.begin(0)  # where a destructor has swallowed that
    assert any(stop.flags())


SWALLOWED = """
import os, signal, time
from train.watch.signals import StoppedEarly, StopRequest

class Deaf:
    def __del__(self):
        os.kill(os.getpid(), getattr(signal, "{name}"))
        time.sleep(0.05)

stop = StopRequest()
stop.install()
stop.heed()
try:
    Deaf()
    for _ in range(100):
        time.sleep(0.01)
except (StoppedEarly, KeyboardInterrupt) as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize(("name", "raised"), [("SIGTERM", "StoppedEarly"), ("SIGINT", "KeyboardInterrupt")])
def test_what_a_destructor_swallows_is_raised_after_it(name, raised):
    command = [sys.executable, "-c", SWALLOWED.format(name=name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (f"{raised}\n", "")


def test_a_second_ctrl_c_interrupts_but_not_the_echo_of_the_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("train.watch.signals.time.monotonic", lambda: now[0])
    stop = StopRequest()
    stop.begin(0)
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGTERM):  # a launcher passes it on at once
        stop._on_signal(number, None)
        now[0] += 0.1
    now[0] += 2
    stop._on_signal(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        stop._on_signal(signal.SIGINT, None)


def test_the_file_is_looked_for_in_the_claimed_folder_alone_and_not_too_often(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("train.watch.signals.time.monotonic", lambda: now[0])
    for name in ("STOP", "STOPPED"):
        (tmp_path / name).touch()
    stop = StopRequest()
    stop.claim(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not any(stop.flags())
    (tmp_path / "STOP").touch()
    assert not any(stop.flags())
    assert not any(StopRequest().flags())
    now[0] = 1.5
    assert any(stop.flags())


RANK = """
import os, sys, time
from train.watch.signals import StopRequest

stop = StopRequest()
stop.install()
stop.begin(0)
print(os.getpid(), flush=True)
until = time.monotonic() + 20
while stop.asked is None and time.monotonic() < until:
    time.sleep(0.02)
print(stop.asked, flush=True)
"""


@pytest.mark.parametrize("launched", [True, False])
def test_a_rank_stops_when_its_launcher_is_gone_but_outlives_a_shell(launched):
    agent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
    environment = {key: value for key, value in os.environ.items() if key != "TORCHELASTIC_RUN_ID"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", agent, RANK], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=environment | ({"TORCHELASTIC_RUN_ID": "none"} if launched else {}),
    )  # fmt: skip
    rank = int(launcher.stdout.readline())
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait() == -signal.SIGUSR1
    if not launched:
        time.sleep(0.5)
        os.kill(rank, signal.SIGUSR2)  # it is there
    assert launcher.stdout.readline() == ("SIGTERM\n" if launched else "SIGUSR2\n")
    launcher.stdout.close()


DEAF = """
import ctypes, sys
from train.watch import signals

signals.DEAF_S = 0.5
stop = signals.StopRequest()
stop.install()
stop.heed()
if sys.argv[1] == "training":
    stop.begin(0)
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
print("blocked", flush=True)
lock(mutex)  # as a collective that waits for another rank: Python's handlers are not called
"""


@pytest.mark.parametrize(
    ("when", "number", "times", "status"),
    [
        ("before", signal.SIGINT, 1, 130),
        ("before", signal.SIGTERM, 1, 0),  # a scheduler's: no crash
        ("training", signal.SIGINT, 2, 130),
    ],
)
def test_signals_end_a_process_that_is_blocked_below_python(when, number, times, status):
    process = subprocess.Popen([sys.executable, "-c", DEAF, when], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "blocked\n"
    for _ in range(times):
        time.sleep(1.5)  # into the call; and a second press, not an echo of the first
        assert process.poll() is None
        process.send_signal(number)
    assert process.wait(timeout=60) == status
    process.stdout.close()
