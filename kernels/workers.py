"""Processes that judge cases, watched from outside: what they say, how they die, and when they take too long."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.routes import Case, Group, case_to_json

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Conditions:
    """How cases are judged. limit_s: for one case, compilation included; start_s: for a process to come up. preload: a
    module that the processes import first. alive: called every second of waiting."""

    device: torch.device
    timed: bool = False
    limit_s: float = 240.0
    start_s: float = 300.0
    preload: str | None = None
    alive: Callable[[], None] = lambda: None


# A process that ends otherwise was ended by somebody, or by the system: that says nothing of the kernel.
FAULTS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


class _DiedError(Exception):
    """A worker that will say no more; its text says how it ended. lasting: it would do so again. hung: it took too
    long, which on a loaded machine a first compilation may."""

    def __init__(self, text: str, *, lasting: bool = False, hung: bool = False) -> None:
        super().__init__(text)
        self.lasting, self.hung = lasting, hung


class _Worker:
    def __init__(self, route: str, conditions: Conditions) -> None:
        self._conditions, self._buffer = conditions, b""
        command = [sys.executable, "-m", "kernels.check_one", route, str(conditions.device)]
        command += ["--timed"] if conditions.timed else []
        command += ["--preload", conditions.preload] if conditions.preload else []
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        # Our folder comes first: others have packages called `kernels` too.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._noise}
        # In a session of its own: Ctrl-C at a terminal is for this process, and would look like a kernel's death there.
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, start_new_session=True, **pipes
        )
        try:
            self._answer(conditions.start_s)
        except _DiedError as died:
            self.close()
            raise _DiedError(f"a process for it could not start: {died}") from None

    def ask(self, case: Case) -> dict[str, Any]:
        """What `judge` says of the case. _DiedError where the process dies over it, or takes too long."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(case_to_json(case)).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._end() from None
        return self._answer(self._conditions.limit_s)

    def close(self) -> None:
        """End the process; one that a driver does not let go is left behind."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        for stream in (self._process.stdin, self._process.stdout, self._noise):
            try:
                stream.close()
            except BrokenPipeError:  # a question that it never read
                continue

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _DiedError(f"timed out after {limit_s:g} s", hung=True)
            if select.select([pipe], [], [], min(1.0, left))[0]:
                read = os.read(pipe, 1 << 16)
                if not read:
                    raise self._end()
                self._buffer += read
            self._conditions.alive()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _end(self) -> _DiedError:
        """How the process ended."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return _DiedError("closed its output")
        if code < 0:
            number = signal.Signals(-code)
            more = " (out of memory?)" if number == signal.SIGKILL else ""
            return _DiedError(f"died by {number.name}{more}", lasting=number in FAULTS)
        self._noise.seek(0)
        last = self._noise.read().decode(errors="replace").strip().splitlines()[-1:]
        return _DiedError(f"ended with status {code}: {''.join(last)[:300]}")


def judged(
    route: str, cases: Iterable[Case], conditions: Conditions, deadline: float | None = None
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """(case, result of `judge`) of each case on a route, as they come: in one process while they are right, the rest in
    a fresh one after each that is wrong. No case begins after `deadline` (of time.monotonic), and none of a group after
    one that took too long."""
    worker: _Worker | None = None
    hung: dict[Group, str] = {}
    broken: str | None = None
    try:
        for case in cases:
            if deadline is not None and time.monotonic() > deadline:
                return
            if broken is not None:  # the next process would not start either
                yield case, {"right": False, "why": broken, "passing": True}
                continue
            if case.group in hung:
                yield case, {"right": False, "why": f"not tried: {hung[case.group]}", "passing": True}
                continue
            if worker is None:
                try:
                    worker = _Worker(route, conditions)
                except _DiedError as died:
                    broken = str(died)
                    yield case, {"right": False, "why": broken, "passing": True}
                    continue
            try:
                result = worker.ask(case)
            except _DiedError as died:
                result = {"right": False, "why": str(died)} | ({} if died.lasting else {"passing": True})
                if died.hung:
                    hung[case.group] = f"{case} {died}"
            if not result["right"]:
                worker.close()
                worker = None
            yield case, result
    finally:
        if worker is not None:
            worker.close()
