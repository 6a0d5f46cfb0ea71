"""What the ranks send each other: every collective that is issued, its bytes and its seconds, by operation."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch's function → (operation, position of the argument whose bytes are the payload: see `Collective`).
FUNCTIONS = {
    "all_reduce": ("all_reduce", 0),
    "reduce": ("reduce", 0),
    "broadcast": ("broadcast", 0),
    "all_gather": ("all_gather", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "_all_gather_base": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "all_to_all": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
}


@dataclass(frozen=True)
class Collective:
    """One collective as this rank issued it.

    size: bytes of the whole tensor that the operation is about, on one rank: what is reduced (all_reduce, reduce,
    reduce_scatter: the input), what comes together (all_gather: the output), what is spread (broadcast).
    seconds: from the call to its end; of an asynchronous call, to the end of the wait for it, less what was computed in
    between: only the time in which this process stood still counts.
    """

    operation: str
    size: int
    group: int
    dtype: torch.dtype
    seconds: float

    @property
    def sent(self) -> float:
        """Bytes that a ring sends from each rank on average: 2(n − 1)/n of an all_reduce's size, else (n − 1)/n."""
        share = (self.group - 1) / self.group
        return self.size * share * (2 if self.operation == "all_reduce" else 1)


class Recorder:
    """Collects the collectives of a block: `with recorded() as recorder:`."""

    def __init__(self) -> None:
        self.collectives: list[Collective] = []
        self.started = time.perf_counter()
        self.ended: float | None = None

    @property
    def seconds(self) -> float:
        """Length of the block so far."""
        return (self.ended or time.perf_counter()) - self.started

    @property
    def share(self) -> float:
        """Part of the block's time that this process spent in collectives, waiting for slower ranks included."""
        return sum(one.seconds for one in self.collectives) / self.seconds

    def bytes(self, operation: str | None = None) -> int:
        """Sum of the sizes, of all operations or one."""
        return sum(one.size for one in self.collectives if operation in (None, one.operation))

    def by_operation(self) -> dict[str, tuple[int, int, float]]:
        """Operation → (calls, bytes, seconds)."""
        found: dict[str, tuple[int, int, float]] = {}
        for one in self.collectives:
            calls, size, seconds = found.get(one.operation, (0, 0, 0.0))
            found[one.operation] = (calls + 1, size + one.size, seconds + one.seconds)
        return found


class _Work:
    """A running collective whose wait is timed; all else is the true handle's."""

    def __init__(self, work: Any, waited: Callable[[float], None]) -> None:
        self._work, self._waited = work, waited

    def wait(self, *arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._work.wait(*arguments, **keywords)
        finally:
            self._waited(time.perf_counter() - started)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextlib.contextmanager
def recorded(*, synchronise: Callable[[], object] | None = None) -> Iterator[Recorder]:
    """Record every collective that this process issues in the block, by torch's or DeepSpeed's calls.

    synchronise: on a GPU `torch.cuda.synchronize`, so that seconds are the operation's and not its launch's (it takes
    away the overlap with computation); None on a CPU. Collectives inside compiled graphs are not seen.
    """
    recorder = Recorder()
    wrapped = {
        name: _timed(getattr(dist, name), *facts, recorder, synchronise)
        for name, facts in FUNCTIONS.items()
        if hasattr(dist, name)
    }
    restore = [*_replace(dist, wrapped), *_replace(dist.distributed_c10d, wrapped), *_replace_in_deepspeed(wrapped)]
    try:
        yield recorder
    finally:
        recorder.ended = time.perf_counter()
        for undo in restore:
            undo()


def _replace(module: Any, wrapped: dict[str, Callable]) -> list[Callable[[], None]]:
    undo = []
    for name, function in wrapped.items():
        if hasattr(module, name):
            undo.append(functools.partial(setattr, module, name, getattr(module, name)))
            setattr(module, name, function)
    return undo


def _replace_in_deepspeed(wrapped: dict[str, Callable]) -> list[Callable[[], None]]:
    """DeepSpeed's backend took two of torch's functions at its start and calls those."""
    try:
        from deepspeed.comm import comm
    except ImportError:
        return []
    backend, undo = comm.cdb, []
    for attribute in ("all_gather_function", "reduce_scatter_function"):
        function = getattr(backend, attribute, None)
        if function is not None and function.__name__ in wrapped:
            undo.append(functools.partial(setattr, backend, attribute, function))
            setattr(backend, attribute, wrapped[function.__name__])
    return undo


def _timed(
    original: Callable, operation: str, position: int, recorder: Recorder, synchronise: Callable[[], object] | None
) -> Callable:
    signature = inspect.signature(original)
    payload_name = list(signature.parameters)[position]

    @functools.wraps(original)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if getattr(_running, "inside", False):  # some of torch's functions call others of this list
            return original(*arguments, **keywords)
        given = signature.bind(*arguments, **keywords).arguments
        size, dtype = _payload(given[payload_name])
        if synchronise is not None:
            synchronise()
        started = time.perf_counter()
        _running.inside = True
        try:
            work = original(*arguments, **keywords)
        finally:
            _running.inside = False
        if synchronise is not None:
            synchronise()
        one = Collective(operation, size, dist.get_world_size(given.get("group")), dtype, time.perf_counter() - started)
        place = len(recorder.collectives)
        recorder.collectives.append(one)
        if work is None or not hasattr(work, "wait"):
            return work

        def waited(seconds: float) -> None:
            one = recorder.collectives[place]
            recorder.collectives[place] = replace(one, seconds=one.seconds + seconds)

        return _Work(work, waited)

    return call


_running = threading.local()


def _payload(value: Tensor | Sequence[Tensor]) -> tuple[int, torch.dtype]:
    tensors = [value] if isinstance(value, Tensor) else list(value)
    return sum(tensor.nbytes for tensor in tensors), tensors[0].dtype
