"""Where each rank's time and memory go: traces/rank-N.jsonl, and the name of a rank that keeps the others waiting."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

LIMIT_BYTES = 4 << 20  # of a trace file; the one before it is kept as rank-N.1.jsonl
SLOW = 1.5  # times the median
WINDOW = 50  # steps between judgements of the ranks


class Traces:
    """Writes the trace of this rank, and adds up every rank's seconds, which ride on the step's own all-reduce.

    flags/take: as of `StopRequest`; 2 numbers a rank (compute, wait), of the micro-batch before. Compute is the forward
    pass from the batch to the all-reduce: what comes after it waits for the slowest rank anyway.
    """

    def __init__(self, folder: Path, rank: int, world: int, device: torch.device) -> None:
        self.path = folder / "traces" / f"rank-{rank}.jsonl"
        self.rank, self.world, self.device = rank, world, device
        self.compute_s, self.wait_s = 0.0, 0.0  # of the last micro-batch
        self._sums = [0.0] * (2 * world)
        self._steps = 0
        self._named: set[tuple[int, str]] = set()
        self.path.parent.mkdir(exist_ok=True)

    def begin(self) -> None:
        """A batch is here: its forward pass begins."""
        self._started = self._mark()

    def end(self, wait_s: float) -> None:
        """The forward pass is issued, and what follows waits for the other ranks. wait_s: seconds for its batch."""
        self._ended, self._waited = self._mark(), wait_s

    def _mark(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def flags(self) -> list[float]:
        """This rank's seconds in its two places of 2·world."""
        slots = [0.0] * (2 * self.world)
        slots[self.rank], slots[self.world + self.rank] = self.compute_s, self.wait_s
        return slots

    def take(self, told: Sequence[float]) -> None:
        """Add the sums of `flags` over the ranks; the device has done all that was issued before `end`."""
        if isinstance(self._started, float):
            self.compute_s = self._ended - self._started
        else:
            self.compute_s = self._started.elapsed_time(self._ended) / 1000
        self.wait_s = self._waited
        self._sums = [a + b for a, b in zip(self._sums, told, strict=True)]

    def slow_ranks(self) -> list[str]:
        """Once every `WINDOW` steps, a line for each rank that was slow in it and is not named yet. Call after every
        step; all ranks get the same answer."""
        self._steps += 1
        if self.world == 1 or self._steps % WINDOW:
            return []
        sums, self._sums = self._sums, [0.0] * (2 * self.world)
        lines = []
        for what, seconds in (("computes", sums[: self.world]), ("waits for data", sums[self.world :])):
            median = statistics.median_low(seconds)
            for rank, spent in enumerate(seconds):
                # A wait that nobody notices is none: a fiftieth of the time of the forward passes.
                slow = spent > SLOW * median and spent - median > 0.02 * sum(sums[: self.world]) / self.world
                if slow and (rank, what) not in self._named:
                    self._named.add((rank, what))
                    lines.append(
                        f"rank {rank} {what} {1000 * spent / WINDOW:.0f} ms a step, the median of the ranks is "
                        f"{1000 * median / WINDOW:.0f} ms: the others wait for it"
                    )
                elif not slow:
                    self._named.discard((rank, what))
        return lines

    def write(self, step: int, seconds: float, wait_s: float) -> None:
        """One line: step, seconds, wait_s, compute_s, rss (MiB, of this process and of its loader workers), GPU MiB."""
        record = {"step": step, "seconds": round(seconds, 4), "wait_s": round(wait_s, 4)}
        record |= {"compute_s": round(self.compute_s, 4)} | memory_mib(self.device)
        with contextlib.suppress(OSError):  # a full disk is told by what must be written
            if self.path.exists() and self.path.stat().st_size > LIMIT_BYTES:
                os.replace(self.path, self.path.with_suffix(".1.jsonl"))
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def memory_mib(device: torch.device) -> dict[str, float]:
    """Resident memory of this process and of its children, MiB; on a GPU allocated, reserved and peak memory too."""
    children = torch.multiprocessing.active_children()
    sizes = {"rss": _rss(os.getpid()), "rss_workers": sum(_rss(child.pid) for child in children)}
    if device.type == "cuda":
        sizes["gpu_allocated"] = torch.cuda.memory_allocated(device)
        sizes["gpu_reserved"] = torch.cuda.memory_reserved(device)
        sizes["gpu_peak"] = torch.cuda.max_memory_allocated(device)
    return {name: round(size / 2**20, 1) for name, size in sizes.items()}


def _rss(pid: int | None) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
