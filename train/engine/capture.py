"""The capture primitive of `graphs.py`: a function of GPU work is recorded once and replayed by one launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Captured(NamedTuple):
    """tensors: what the function gave, in memory that stays its own; `replay` computes them anew, in place."""

    tensors: Sequence[Tensor | None]
    replay: Callable[[], object]


class Recorder(Protocol):
    """How a kind of device captures. Functions given to it take nothing, read tensors that stay where they are, and
    return a list of tensors or None. All captures of one recorder share their scratch memory, so a replay may
    overwrite whatever another one left, but for `Captured.tensors`."""

    def side(self) -> contextlib.AbstractContextManager:
        """Where a function runs a few times before it is captured."""

    def capture(self, function: Callable[[], list[Tensor | None]]) -> Captured:
        """Record the function. Raises whatever forbids it; the device is usable afterwards."""

    def renew(self) -> None:
        """Take other memory from here on: all that was captured is given up."""


class CudaRecorder:
    """CUDA graphs, by the recipe of `torch.cuda.make_graphed_callables` (torch/cuda/graphs.py): warm-up and captures on
    one stream of their own, one private pool.

    Errors are judged by thread: the loader's pinning thread allocates host memory and NCCL's watchdog queries events at
    any time, which under torch's default, `global`, would invalidate our capture.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def side(self) -> Iterator[None]:
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.synchronize(self.device)

    def capture(self, function: Callable[[], list[Tensor | None]]) -> Captured:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                tensors = function()
        finally:
            torch.cuda.set_stream(before)  # torch leaves its side stream current where a capture ends in an error
        return Captured(tensors, graph.replay)

    def renew(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()


# By type of device; the tests put a recorder for the CPU here that runs the function again.
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
