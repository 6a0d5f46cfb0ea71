"""A rank that dies, goes silent or hangs ends the whole job in bounded time, and is named; slowness alone does not."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.ranks import ROOT, start_ranks
from train.config.schema import Config
from train.watch import heartbeat, watchdog
from train.watch.heartbeat import HeartbeatFile, read_beat
from train.watch.watchdog import stall_limit

pytestmark = pytest.mark.slow

MEMBER = """
import sys, time
from pathlib import Path
from train.watch.heartbeat import PROGRESS, beat
from train.watch.watchdog import Watchdog, leaving, watch

folder, rank, world, stall, silent = Path(sys.argv[1]), *map(float, sys.argv[2:6])
dog = Watchdog(folder, int(rank), int(world), run="one", stall_s=stall, silent_s=silent)
watch(dog)
PROGRESS.done(1)
for line in sys.stdin:  # the main thread goes on when told
    if line.strip() == "fail":
        leaving("failed", "disk on fire")
        sys.exit(1)
    if line.strip() == "end":
        dog.close()
        sys.exit(0)
    beat("step")
time.sleep(300)
"""


class Job:
    """Processes with a watchdog and a main thread that moves on command."""

    def __init__(self, folder: Path, world: int, stall: float = 60.0, silent: float = 1.0) -> None:
        folder.mkdir(exist_ok=True)
        self.members = [
            subprocess.Popen(
                [sys.executable, "-c", MEMBER, str(folder), str(rank), str(world), str(stall), str(silent)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        self.folder = folder
        deadline = time.monotonic() + 60
        while len(list((folder / "heartbeat").glob("rank-*.json"))) < world and time.monotonic() < deadline:
            time.sleep(0.02)

    def tell(self, rank: int, word: str = "go") -> None:
        self.members[rank].stdin.write(word + "\n")
        self.members[rank].stdin.flush()

    def step(self, seconds: float, ranks: list[int]) -> None:
        """Let the main threads of these ranks move for a while."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for rank in ranks:
                self.tell(rank)
            time.sleep(0.05)

    def end_of(self, rank: int) -> tuple[int, str]:
        """(status, what it said), within a bounded time."""
        _, said = self.members[rank].communicate(timeout=60)
        return self.members[rank].returncode, said

    def close(self) -> None:
        for member in self.members:
            member.kill()
            member.communicate()


@pytest.fixture
def job(tmp_path):
    jobs = []

    def start(*arguments, **keywords) -> Job:
        jobs.append(Job(tmp_path / "run", *arguments, **keywords))
        return jobs[-1]

    yield start
    for one in jobs:
        one.close()


def test_a_killed_rank_is_named_by_all_others(job):
    ranks = job(3)
    ranks.members[2].kill()
    for survivor in (0, 1):
        status, said = ranks.end_of(survivor)
        assert status == 1
        assert "error: rank 2 on " in said
        assert "died" in said
        assert (ranks.folder / f"stacks-rank-{survivor}.txt").read_text().count("File") > 0
    assert "rank 2 on " in (ranks.folder / "log.txt").read_text()


def test_a_stopped_rank_is_silent_only_once_the_others_wait_for_it(job):
    ranks = job(2)
    ranks.step(0.5, [0, 1])
    ranks.members[1].send_signal(signal.SIGSTOP)
    ranks.step(2.5, [0])
    assert ranks.members[0].poll() is None  # steps went on: it cannot be gone
    status, said = ranks.end_of(0)
    assert status == 1
    assert "rank 1 on " in said
    assert "is silent for" in said
    assert "phase step, step 1" in said
    ranks.members[1].send_signal(signal.SIGCONT)
    status, said = ranks.end_of(1)  # awake again, it finds the job over
    assert status == 1
    assert "rank 1 on " in said


def test_a_rank_that_fails_tells_the_others_why(job):
    ranks = job(3)
    ranks.tell(1, "fail")
    for survivor in (0, 2):
        status, said = ranks.end_of(survivor)
        assert status == 1
        assert "failed: disk on fire" in said
        assert "rank 1 on " in said


def test_a_hung_main_thread_ends_with_its_stacks_and_the_rank_furthest_behind(job):
    ranks = job(2, stall=2.0, silent=60.0)
    ranks.step(0.5, [0, 1])
    ranks.tell(0)
    ranks.tell(0)
    for rank in (0, 1):
        status, said = ranks.end_of(rank)
        assert status == 1
        assert f"rank {rank} on " in said
        assert "no progress for" in said
        assert "furthest behind: rank 1 on " in said
        assert "in <module>" in (ranks.folder / f"stacks-rank-{rank}.txt").read_text()


def test_ranks_that_end_in_their_own_time_alarm_nobody(job):
    ranks = job(2)
    ranks.tell(1, "end")
    assert ranks.end_of(1)[0] == 0
    time.sleep(1.0)
    assert ranks.members[0].poll() is None
    ranks.tell(0, "end")
    assert ranks.end_of(0) == (0, "")


def test_a_node_that_does_not_share_the_runs_folder_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "SEEN_S", 0.3)
    for folder, run in (("its-own", "one"), ("same", "of yesterday")):
        first = HeartbeatFile(tmp_path / "same", 0, run)
        first.path.parent.mkdir(parents=True, exist_ok=True)
        first.write()
        dog = watchdog.Watchdog(tmp_path / folder, 1, 2, run="one", stall_s=60, silent_s=60)
        with pytest.raises(ValueError, match=r"does not see what rank 0 writes in .* all nodes share"):
            dog.start()


def test_a_process_that_cannot_be_looked_at_is_not_called_dead(tmp_path, monkeypatch):
    file = HeartbeatFile(tmp_path, 0, "one")
    file.path.parent.mkdir()
    file.write()
    beat, _ = read_beat(file.path)
    assert not beat.gone()
    assert replace(beat, born="1").gone()  # another process has its number

    def fails(pid: int) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(heartbeat, "_process", fails)
    assert not beat.gone()


def test_a_hung_loader_is_told_by_the_loader_itself():
    def limit(**data: float) -> float:
        return stall_limit(Config.model_validate({"engine": {"stall_minutes": 2}, "data": data}))

    assert limit(workers=4, stall_minutes=30) == 60 * 31
    assert limit(workers=4, stall_minutes=0.5) == 60 * 2
    assert limit(workers=0, stall_minutes=30) == 60 * 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_training_ends_when_a_rank_is_lost(runs, number):
    name = f"lost-{number.name}"
    settings = {"model__prior": "false", "data__workers": 0, "train__steps": 5000, "engine__silent_minutes": 0.05}
    ranks = start_ranks(runs.command(name, **settings), 2, runs.environment())
    metrics = runs.folder(name) / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (metrics.exists() and '"step": 3' in metrics.read_text()):
            time.sleep(0.05)
        ranks[1].send_signal(number)
        _, said = ranks[0].communicate(timeout=120)
        assert ranks[0].returncode == 1
        assert "error: rank 1 on " in said
        assert ("died" if number == signal.SIGKILL else "silent") in said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert os.path.exists(runs.folder(name) / "stacks-rank-0.txt")
