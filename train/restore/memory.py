"""How large tiles may be, and how many at once, in the memory that is free."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from model.summary import fake_copy
from train.log import log
from train.restore.tiles import PLAIN, SMALLEST_TILE, Way, restore_batch

CPU_SHARE, CPU_MOST = (
    0.25,
    1 << 30,
)  # of the free memory, and never more; convolutions take as much again for themselves
GPU_SHARE = 0.6  # of the free memory: kernels' scratch space and the allocator's slack come on top
MOST_AT_ONCE = 32
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")


def fitting_tile(network: nn.Module, tile: int, way: Way = PLAIN) -> tuple[int, int]:
    """(side of a tile in px, tiles at once) for the network on its device: the side asked for, halved until one tile
    fits into the memory that is free now. ValueError where the smallest does not."""
    device = next(network.parameters()).device
    budget = free_bytes(device)
    side = tile
    while (needed := forward_bytes(network, side, way)) > budget:
        if side <= SMALLEST_TILE:
            raise ValueError(
                f"not enough free memory: tiles of {side} px need {needed / 2**20:.0f} MiB, and {budget / 2**20:.0f} "
                "MiB may be taken: end other programs, or use another --device"
            )
        side = max(SMALLEST_TILE, side // 2)
    if side < tile:
        log.warning("tiles of %d px instead of %d: little memory is free", side, tile)
    # On a CPU one tile fills all cores; a second one only costs memory.
    return side, 1 if device.type == "cpu" else max(1, min(MOST_AT_ONCE, budget // max(needed, 1)))


def free_bytes(device: torch.device, most: float = CPU_MOST) -> int:
    """Bytes that tiles may take of the device's memory that is free; of a CPU's at most `most`."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + reusable))
    free = _available()
    return CPU_MOST if free is None else int(min(most, CPU_SHARE * free))


def _available() -> int | None:
    """Bytes of host memory that are free for us, None where the system does not say (it is no Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        limit, used = (Path(name).read_text().strip() for name in CGROUPS)
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


def forward_bytes(network: nn.Module, side: int, way: Way = PLAIN) -> int:
    """The most bytes of tensors that are alive at once while one tile of `side` px is restored: counted on a copy
    without memory, which computes nothing. Weights are not counted."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        twin = fake_copy(network).eval()
        with _Alive() as alive:
            restore_batch(twin, torch.empty(1, 3, side, side), way)
    return alive.most


class _Alive(TorchDispatchMode):
    """Adds up the bytes of every storage that operators make, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)
