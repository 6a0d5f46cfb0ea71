"""What each rank is doing, in <run folder>/heartbeat/rank-N.json: the progress of its main thread, for people and for
the watchdogs of the other ranks."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from data.files import write_atomically

RUNNING, DONE, STOPPED, FAILED = "running", "done", "stopped", "failed"


class Progress:
    """Steps forward of the main thread; every rank counts the same ones, so the fewest beats are furthest behind."""

    def __init__(self) -> None:
        self.phase, self.step, self.beats = "start", 0, 0
        self._warm = False

    def beat(self, phase: str) -> None:
        """The main thread begins, or goes on with, `phase`: start, data, step, evaluate, save, finish."""
        self.phase = phase
        self.beats += 1

    def done(self, step: int) -> None:
        """An optimizer step is done."""
        self.step, self._warm = step, True
        self.beats += 1

    @property
    def patience(self) -> float:
        """Factor on all limits: until the first step is done compilers run, and whole checkpoints go through slow file
        systems."""
        return 1.0 if self._warm and self.phase in ("data", "step", "evaluate") else 3.0


PROGRESS = Progress()  # of this process: there is one main thread
beat = PROGRESS.beat


@dataclass(frozen=True)
class Beat:
    """One heartbeat. run: which run in the folder. place: boot and process namespace, where `pid` means something.
    born: start of the process in the kernel's ticks, as pids are used again. written: times the file was written.
    time: for people."""

    run: str
    rank: int
    host: str
    pid: int
    place: str
    born: str
    state: str
    message: str
    phase: str
    step: int
    beats: int
    written: int
    time: str

    @property
    def who(self) -> str:
        """Rank and host, for messages."""
        return f"rank {self.rank} on {self.host}"

    def gone(self) -> bool:
        """Whether its process is known to have ended; False where this one cannot see it (another machine)."""
        if self.place != _place():
            return False
        try:
            born, zombie = _process(self.pid)
        except OSError:  # too many open files, or no /proc: nothing is known
            return False
        return born != self.born or zombie


class HeartbeatFile:
    """Writes the heartbeat of this rank."""

    def __init__(self, folder: Path, rank: int, run: str) -> None:
        self.run = run
        self.path = heartbeat_path(folder, rank)
        self.rank = rank
        self.written = 0
        self.host = socket.gethostname()
        self._who = {"host": self.host, "pid": os.getpid(), "place": _place()}
        self._who["born"] = _process(os.getpid())[0]

    def write(self, state: str = RUNNING, message: str = "") -> None:
        """Replace the file at once; where the disk is full its time is renewed instead, which the others see too."""
        self.written += 1
        now = {"phase": PROGRESS.phase, "step": PROGRESS.step, "beats": PROGRESS.beats, "written": self.written}
        now["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        beat = Beat(self.run, self.rank, **self._who, state=state, message=message, **now)
        try:
            write_atomically(self.path, json.dumps(asdict(beat)) + "\n", durable=False)
        except OSError:
            with contextlib.suppress(OSError):
                os.utime(self.path)


def heartbeat_path(folder: Path, rank: int) -> Path:
    """Of a rank, in a run's folder."""
    return folder / "heartbeat" / f"rank-{rank}.json"


def read_beat(path: Path) -> tuple[Beat | None, tuple]:
    """(heartbeat, something that differs after every write); (None, ()) where there is none to read."""
    try:
        with open(path, encoding="utf-8") as file:
            facts, text = os.fstat(file.fileno()), file.read()
        return Beat(**json.loads(text)), (facts.st_ino, facts.st_mtime_ns, text)
    except (OSError, ValueError, TypeError):
        return None, ()


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {os.getpid()}"


def _process(pid: int) -> tuple[str, bool]:
    """(start in ticks, whether it is dead and only not yet reaped); ("", False) of no process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", False
    return fields[19], fields[0] in "ZX"
