"""Asking a run to stop: signals, or a file STOP in its folder; all ranks agree, save at a step boundary and exit 0."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from data.files import write_atomically

if TYPE_CHECKING:
    from train.engine.engine import Engine
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOP_FILE, STOPPED_FILE = "STOP", "STOPPED"
REASONS = (*(number.name for number in SIGNALS), f"file {STOP_FILE}")
LOOK_EVERY_S = 1.0  # between looks for the file STOP: a shared file system is asked no more often
DEAF_S = 10.0  # for the main thread to end by itself at an interrupt
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SECOND_AFTER_S = 1.0  # launchers pass a terminal's Ctrl-C on to ranks that have had it already: that is no second one


class StoppedEarly(BaseException):
    """A signal other than Ctrl-C came before training began: there is nothing to save."""


def _ending(name: str) -> BaseException:
    return KeyboardInterrupt() if name == "SIGINT" else StoppedEarly(name)


def _stop_with_launcher() -> None:
    """torchrun's and accelerate's agents die of USR1 and USR2, and their ranks, each in a session of its own, would
    train on with nobody to end them: let the kernel send TERM then. A run without an agent outlives its shell."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(AttributeError, OSError):  # not Linux
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


class StopRequest:
    """What asked this process to stop, and what all ranks have agreed on.

    asked: one of `REASONS`, or None; known to this rank alone. agreed: the same on every rank, set by `agree` and by
    `training_step`. Until `heed` a signal is only noted, so that imports are not torn; until `begin` it ends the
    process at once, as there is nothing to save; so does a second Ctrl-C at any time. folder: the run's, on the one
    rank that looks for STOP there and writes STOPPED.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.agreed: str | None = None
        self.step = 0
        self._folder: Path | None = None
        self._heeding = self._training = False
        self._interrupted_at: float | None = None
        self._raised: tuple[BaseException, int] | None = None  # by the handler, last
        self._looked_at = float("-inf")

    def install(self) -> None:
        """Take over the signals (main thread only), also where a launcher's shell had them ignored; before anything
        that is slow to import."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        if sys.unraisablehook != self._once_more:
            self._shown = sys.unraisablehook
        sys.unraisablehook = self._once_more
        _stop_with_launcher()
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._end_if_deaf, args=[read], name="signals", daemon=True).start()

    def heed(self) -> None:
        """From now on a signal ends the process; one that came before does so now."""
        self._heeding = True
        if self.asked is not None:
            raise _ending(self.asked)

    def claim(self, folder: Path) -> None:
        """Look for STOP in this run's folder, and drop what an earlier run left there. Rank 0, once it owns it."""
        for name in (STOP_FILE, STOPPED_FILE):
            (folder / name).unlink(missing_ok=True)
        self._folder = folder

    def begin(self, step: int) -> None:
        """From now on, with `step` steps done, a signal waits for the next step boundary."""
        self.step = step
        self._training = True

    def mark(self, reason: str) -> None:
        """Write STOPPED (JSON: step, reason) into the claimed folder; without one there is nothing to say."""
        if self._folder is not None:
            text = json.dumps({"step": self.step, "reason": reason}) + "\n"
            write_atomically(self._folder / STOPPED_FILE, text, durable=False)
            (self._folder / STOP_FILE).unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._training:
            self.asked = name  # noted even where a destructor swallows what is raised: then the first step stops
            if self._heeding:
                self._raised = _ending(name), number
                raise self._raised[0]
            return
        if number == signal.SIGINT:
            if self._interrupted_at is None:
                self._interrupted_at = time.monotonic()
            elif time.monotonic() - self._interrupted_at > SECOND_AFTER_S:
                self._raised = KeyboardInterrupt(), number
                raise self._raised[0]
        if self.asked is None:
            self.asked = name
            if os.environ.get("RANK", "0") == "0":
                again = "; Ctrl-C again interrupts at once" if number == signal.SIGINT else ""
                with contextlib.suppress(OSError):  # not through the log: what was interrupted may hold its lock
                    os.write(2, f"\n{name}: saving after this step, then stopping{again}\n".encode())

    def _once_more(self, swallowed: sys.UnraisableHookArgs) -> None:
        """Python swallows what a handler raises inside a destructor or a callback: let the handler run again after."""
        if self._raised is None or swallowed.exc_value is not self._raised[0]:
            self._shown(swallowed)
            return
        again = threading.Timer(0.01, _thread.interrupt_main, [self._raised[1]])  # at once it would be swallowed too
        again.daemon = True
        with contextlib.suppress(RuntimeError):  # Python is shutting down
            again.start()

    def _end_if_deaf(self, received: int) -> None:
        """Python calls handlers only when the main thread comes back to it, and a collective that waits for another
        rank does not: end the process here where the handler should have."""
        first: float | None = None
        while True:
            number = os.read(received, 1)[0]
            if number not in SIGNALS:
                continue
            if self._training and (number != signal.SIGINT or first is None):
                first = time.monotonic() if number == signal.SIGINT else first
                continue
            if self._training and first is not None and time.monotonic() - first <= SECOND_AFTER_S:
                continue
            time.sleep(DEAF_S)
            if self._training or number == signal.SIGINT:
                os._exit(130)
            with contextlib.suppress(OSError):
                self.mark(signal.Signals(number).name)
            os._exit(0)  # as `StoppedEarly` ends it: a scheduler must not take it for a crash

    def flags(self) -> list[float]:
        """One number per reason, to be summed over the ranks."""
        now = time.monotonic()
        if self.asked is None and self._folder is not None and now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            if (self._folder / STOP_FILE).exists():
                self.asked = REASONS[-1]
        return [float(reason == self.asked) for reason in REASONS]

    def take(self, told: Sequence[float]) -> None:
        """Agree on the first reason that any rank has, from the sums of `flags`."""
        if self.agreed is None:
            self.agreed = next((reason for reason, count in zip(REASONS, told, strict=True) if count > 0), None)

    def agree(self, engine: Engine) -> bool:
        """Ask all ranks; every rank calls this at the same place. Whether the run stops."""
        import torch

        self.take(engine.sum(torch.tensor(self.flags(), dtype=torch.float64)).tolist())
        return self.agreed is not None
