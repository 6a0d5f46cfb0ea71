"""What loader processes are doing, asked when no batch comes: which sample each is at, and where in the program."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ASK = signal.SIGRTMIN + 5  # nobody else sends it, and faulthandler answers it even where Python itself hangs
ANSWER_S = 1.0
SHOWN = 4  # processes in a message
FRAMES = 3
STATES = {"T": "stopped by a signal", "D": "waiting for a disk or network", "Z": "dead", "R": "computing"}
_sample: int | None = None
_stack: IO[str] | None = None


def answer_in(folder: Path) -> None:
    """In a worker: keep a file of what it is doing, and write stacks beside it when asked."""
    global _sample, _stack
    _stack = open(folder / f"{os.getpid()}.stack", "w")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.register(ASK, file=_stack, all_threads=True, chain=False)
    # Last: it says that this process may be asked. The signal would end one that is not ready.
    _sample = os.open(folder / f"{os.getpid()}.sample", os.O_WRONLY | os.O_CREAT, 0o600)


def at_sample(name: str) -> None:
    """In a worker: this sample is next. Elsewhere nothing."""
    if _sample is not None:
        text = name.encode()
        os.pwrite(_sample, text, 0)
        os.ftruncate(_sample, len(text))


def describe(folder: Path, pids: Sequence[int]) -> str:
    """What the workers of these pids do, in one line."""
    for pid in pids:
        if (folder / f"{pid}.sample").exists():
            with contextlib.suppress(OSError):
                os.kill(pid, ASK)
    time.sleep(ANSWER_S)
    lines = [f"worker {number} (process {pid}) {_doing(folder, pid)}" for number, pid in enumerate(pids[:SHOWN])]
    return "; ".join(lines) + (f"; and {len(pids) - SHOWN} more" if len(pids) > SHOWN else "")


def _doing(folder: Path, pid: int) -> str:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "is gone"
    if not (folder / f"{pid}.sample").exists():
        return "has not started yet" + (f" and is {STATES[state]}" if state in STATES else "")
    text = f"is {STATES.get(state, 'waiting')}"
    sample, stack = (_read(folder / f"{pid}.{kind}") for kind in ("sample", "stack"))
    if sample:
        text += f" at sample {sample}"
    frames = [f"{Path(file).name}:{line} {name}" for file, line, name in _frames(stack)]
    return text + (f" in {' < '.join(frames)}" if frames else "")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _frames(stack: str) -> list[tuple[str, str, str]]:
    """The innermost frames of the main thread, which is the last that faulthandler writes."""
    main = re.split(r"^(?:Current thread|Thread) .*$", stack, flags=re.MULTILINE)[-1]
    return re.findall(r'File "(.*?)", line (\d+) in (\S+)', main)[:FRAMES]
