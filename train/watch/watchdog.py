"""Ends a run that cannot go on, within a bounded time and with the rank named: a rank that is dead, silent or hung.

A daemon thread in every rank. Rank 0 watches all heartbeats, the others rank 0's, and a rank that ends says so in its
own, so news needs two hops at most. Only changes seen on this machine's monotonic clock count: clocks of nodes differ,
and file systems show news late. A silent rank counts as lost only if this one is held up as well: as long as steps go
on, every rank takes part in them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from train.watch.heartbeat import (
    DONE,
    FAILED,
    PROGRESS,
    RUNNING,
    STOPPED,
    Beat,
    HeartbeatFile,
    heartbeat_path,
    read_beat,
)

if TYPE_CHECKING:
    from train.config.schema import Config
LEAVING_S = 5.0  # a rank that hears of another's end lets its own main thread tell it better
SEEN_S = 120.0  # for a shared file system to show a file that another node has made
GRACE_S = 15.0  # for the last notes of a run that ends; its file system may be what hangs


def stall_limit(config: Config) -> float:
    """Seconds without progress that end a rank: engine.stall_minutes, but not before a loader that hangs has been able
    to say itself what its workers do."""
    loader = config.data.stall_minutes + 1 if config.data.workers else 0.0
    return 60 * max(config.engine.stall_minutes, loader)


class Watchdog:
    """Watches this process's main thread and the other ranks. Seconds: stall_s without progress of this main thread,
    silent_s without a sign of life of another rank; both times `PROGRESS.patience`.

    run: a name that the ranks of this run share and no earlier run in the folder had, as a file system may still show
    what that one left. on_stopped: called before ending with status 0, where a rank was stopped before training.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        *,
        run: str,
        stall_s: float,
        silent_s: float,
        on_stopped: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self.stall_s, self.silent_s = stall_s, silent_s
        self.interval_s = min(10.0, max(0.1, silent_s / 12))
        self.file = HeartbeatFile(folder, rank, run)
        self.stacks = folder / f"stacks-rank-{rank}.txt"
        self._on_stopped = on_stopped
        self._peers = list(range(1, world)) if rank == 0 else [0]
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._beats, self._moved = -1, time.monotonic()
        self._signs: dict[int, tuple] = {}
        self._seen: dict[int, float] = {}
        self._last: dict[int, Beat] = {}

    def start(self) -> None:
        """Show the first heartbeat and begin to watch; rank 0 has made the run's folder and starts too. ValueError
        where this node does not see that."""
        deadline = time.monotonic() + SEEN_S
        while self.rank != 0 and getattr(read_beat(heartbeat_path(self.folder, 0))[0], "run", None) != self.file.run:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{self.file.host} does not see what rank 0 writes in {self.folder}: set run.root to a folder that "
                    "all nodes share"
                )
            time.sleep(0.1)
        self.file.path.parent.mkdir(exist_ok=True)
        self.stacks.unlink(missing_ok=True)
        self.file.write()
        self._moved = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self, state: str = DONE, message: str = "") -> None:
        """Stop watching and tell the other ranks how this one ends."""
        if not self._closing.is_set():
            self._closing.set()
            self._wake.set()
            held = self._lock.acquire(timeout=GRACE_S)  # the thread may wait for a file system
            self.file.write(state, message)
            if held:
                self._lock.release()

    def wait_for_verdict(self) -> None:
        """Called by the main thread when a collective failed: give the watchdog time to find out whose fault it is. It
        ends the process then; returning means that no rank was found dead."""
        self._wake.set()
        deadline = time.monotonic() + 1.5 * self.silent_s * PROGRESS.patience + 2 * self.interval_s
        while time.monotonic() < deadline and not self._closing.is_set() and self.world > 1:
            time.sleep(0.1)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closing.is_set():
            self._wake.wait(self.interval_s if not self._wake.is_set() else min(1.0, self.interval_s))
            with self._lock:
                if self._closing.is_set():
                    return
                now = time.monotonic()
                if now - last > 3 * self.interval_s + 2.0:
                    self._forgive(now)
                self.file.write()
                problem = self._stall(now) or self._lost(now)
                last = time.monotonic()
                if last - now > self.interval_s:  # a slow file system: nobody's signs of life came through
                    self._forgive(last)
            if problem is not None:
                self._end(*problem)

    def _forgive(self, now: float) -> None:
        """This process stood still itself (suspended, or waiting for a file system): count anew."""
        self._moved = now
        self._seen = dict.fromkeys(self._seen, now)

    def _held_up(self, now: float) -> float:
        """Seconds since the main thread's last progress."""
        if PROGRESS.beats != self._beats:
            self._beats, self._moved = PROGRESS.beats, now
        return now - self._moved

    def _stall(self, now: float) -> tuple[str, str] | None:
        held_up = self._held_up(now)
        if held_up <= self.stall_s * PROGRESS.patience:
            return None
        text = f"no progress for {held_up:.0f} s in phase {PROGRESS.phase} after step {PROGRESS.step}"
        beats = [read_beat(heartbeat_path(self.folder, rank))[0] for rank in range(self.world)]
        beats = [beat for beat in beats if beat is not None and beat.run == self.file.run]
        if self.world > 1 and beats:
            least = min(b.beats for b in beats)
            behind = [f"{b.who} (phase {b.phase}, step {b.step})" for b in beats if b.beats == least]
            if len(behind) < len(beats):
                text += f"; furthest behind: {', '.join(behind[:4])}"
        return FAILED, (
            f"{text}; what every thread does is in {self.stacks.name}; go on with --resume auto, and a larger "
            "engine.stall_minutes if it was only slow"
        )

    def _lost(self, now: float) -> tuple[str, str] | None:
        for rank in self._peers:
            path = heartbeat_path(self.folder, rank)
            beat, sign = read_beat(path)
            if beat is not None and beat.run == self.file.run and self._signs.get(rank) != sign:
                self._signs[rank], self._seen[rank], self._last[rank] = sign, now, beat
            beat = self._last.get(rank)
            if beat is None or beat.state == DONE:
                continue
            if beat.state != RUNNING:
                verb = "stopped" if beat.state == STOPPED else "failed"
                # A rank that ended because of a third one names that one.
                text = beat.message if beat.message.startswith("rank ") else f"{beat.who} {verb}: {beat.message}"
                return beat.state, text
            where = f"its last sign: phase {beat.phase}, step {beat.step}"
            if beat.gone():
                again = read_beat(path)[0]  # its last words may have come between
                if again is None or again.state == RUNNING:
                    return FAILED, f"{beat.who} died (process {beat.pid} is gone; {where}); go on with --resume auto"
                continue
            limit = self.silent_s * PROGRESS.patience
            silent = now - self._seen[rank]
            if silent > limit and self._held_up(now) > limit / 2:
                return FAILED, f"{beat.who} is silent for {silent:.0f} s ({where}); go on with --resume auto"
        return None

    def _end(self, state: str, text: str) -> None:
        """Last notes, then the end of the process, whatever the main thread is blocked in."""
        own = text.startswith("no progress")
        line = f"rank {self.rank} on {self.file.host}: {text}" if own else text
        status = 0 if state == STOPPED else 1
        ending = threading.Timer(GRACE_S, os._exit, [status])
        ending.daemon = True
        ending.start()
        self.file.write(state, line)
        if not own and self._closing.wait(LEAVING_S if state != FAILED or " failed: " in text else 0.5):
            ending.cancel()
            return
        with contextlib.suppress(OSError):
            os.write(2, f"error: {line}\n".encode() if status else f"{line}\n".encode())
        with contextlib.suppress(OSError):
            if status:
                with open(self.stacks, "w") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
            if self.rank == 0:
                if status == 0:
                    self._on_stopped(line)
                with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
        os._exit(status)


_current: Watchdog | None = None


def watch(dog: Watchdog, agreed: Callable[[], AbstractContextManager] = contextlib.nullcontext) -> None:
    """Start the watchdog of this process; every rank calls this. agreed: `Engine.agreed`, which tells all of a failure.

    Rank 0's is first: a network file system that was asked too early remembers for a minute that nothing is there.
    """
    global _current
    for first in (True, False):
        with agreed():
            if (dog.rank == 0) is first:
                _current = dog
                dog.start()


def leaving(state: str, message: str) -> None:
    """Tell the other ranks how this one ends, if it is watched; before every end that is not `close`d."""
    if _current is not None:
        _current.close(state, message)


def blame() -> None:
    """After a failed collective: ends this process with the rank named if one is found dead, else returns."""
    if _current is not None:
        _current.wait_for_verdict()
