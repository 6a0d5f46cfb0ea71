"""Looking cached features up for a loader's batches, and the switch that ends it."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from data.feature_cache.codec import Levels, decode
from data.feature_cache.lookup import SegmentReader
from data.feature_cache.spec import CacheSpec, crop_keys

log = logging.getLogger("sharpprior.data")

_LOOK_AGAIN_S = 0.5  # between looks at what others have appended
_MEMORY_BYTES_PER_S = 1e9  # slower than this, records come from a disk


@dataclass
class ReadStats:
    """What a reader of one process has done; a damaged record counts once as corrupt, its crop as a miss."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    bytes: int = 0


class Found(NamedTuple):
    """What a look-up found of a batch of B crops: L tensors fp16 [n, c, h, w] of n of them, in the batch's order; which
    those are, bool [B]; what the look-up cost, and damaged records that it met."""

    levels: list[Tensor]
    hits: Tensor
    seconds: float
    bytes: int
    corrupt: int


class FeatureReader:
    """Looks features up by crop; `attach` is a loader's `attach`. Picklable, and safe after a fork."""

    def __init__(self, folder: Path, spec: CacheSpec) -> None:
        self.folder, self.spec = folder, spec
        self._reset()

    def _reset(self) -> None:
        self._layout, self.stats, self._looked = self.spec.layout, ReadStats(), -math.inf
        self.segments, self._process = SegmentReader(self.folder, self._layout), os.getpid()
        self._from_disk, self._failed = True, False

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "spec": self.spec}

    def __setstate__(self, state: dict) -> None:
        self.folder, self.spec = state["folder"], state["spec"]
        self._reset()

    def get(self, key: bytes) -> list[Tensor] | None:
        """The crop's level features, fp16 [c, h, w], or None."""
        levels, hits = self.read_batch([key])
        return [level[0] for level in levels] if hits[0] else None

    def attach(self, batch: dict) -> None:
        """Add to a loader batch of B crops what is cached of it: `features`, a `Found`."""
        bytes_before, corrupt_before = self.stats.bytes, self.stats.corrupt
        started = time.perf_counter()
        levels, hits = self._read_or_miss(crop_keys(batch))
        seconds = time.perf_counter() - started
        read, corrupt = self.stats.bytes - bytes_before, self.stats.corrupt - corrupt_before
        batch["features"] = Found(levels, torch.tensor(hits), seconds, read, corrupt)

    def _read_or_miss(self, keys: Sequence[bytes]) -> tuple[list[Tensor], list[bool]]:
        """`read_batch`, but misses where that fails: no shared memory or file descriptors left, say."""
        try:
            return self.read_batch(keys)
        except (OSError, RuntimeError) as error:
            if not self._failed:
                log.warning("feature cache: not read (%s); the crops are computed", error)
            self._failed = True
            return _room_for(0, self.spec.levels), [False] * len(keys)

    def read_batch(self, keys: Sequence[bytes]) -> tuple[list[Tensor], list[bool]]:
        """(L tensors fp16 [n, c, h, w] of the n keys found, in order; which keys those are)."""
        if self._process != os.getpid():
            self._reset()  # of a forked child: its parent's counts and files are the parent's
        self._look_for_new(keys)
        known = [key in self.segments for key in keys]
        reading = time.perf_counter()
        if self._from_disk and sum(known) > 1:
            self.segments.ask_for(key for key, there in zip(keys, known, strict=True) if there)
        levels, hits = self._read_known(keys, known)
        found = sum(hits)
        # Asking ahead lets a disk read a batch at once, but for records in memory it is a call for nothing.
        self._from_disk = (time.perf_counter() - reading) * _MEMORY_BYTES_PER_S > found * self._layout.record_bytes
        self.stats.hits += found
        self.stats.misses += len(keys) - found
        self.stats.bytes += found * self._layout.record_bytes
        self.stats.corrupt = self.segments.corrupt
        return levels, hits

    def _look_for_new(self, keys: Sequence[bytes]) -> None:
        # A full cache needs no looks, but deleted segments hold their disk space until they are closed.
        pause = _LOOK_AGAIN_S if any(key not in self.segments for key in keys) else 20 * _LOOK_AGAIN_S
        if time.monotonic() - self._looked >= pause:
            self.segments.refresh()
            self._looked = time.monotonic()

    def _read_known(self, keys: Sequence[bytes], known: Sequence[bool]) -> tuple[list[Tensor], list[bool]]:
        spec, room = self.spec, sum(known)
        levels = _room_for(room, spec.levels)
        if spec.dtype == "fp16":  # read straight to where the features will be used
            targets = [level.numpy() for level in levels]
            used = sum(2 * math.prod(level) for level in spec.levels)
            padding = [np.empty(self._layout.payload_bytes - used, np.uint8)]
        else:
            payload = torch.empty(room, self._layout.payload_bytes, dtype=torch.uint8)
            targets, padding = [payload.numpy()], []
        hits, found = [], 0
        for key, there in zip(keys, known, strict=True):
            hits.append(there and self.segments.read(key, [*(target[found] for target in targets), *padding]))
            found += hits[-1]
        levels = [level[:found] for level in levels]
        if spec.dtype == "int8":
            decode(payload[:found], spec.levels, spec.dtype, into=levels)
        return levels, hits

    def close(self) -> None:
        """Close the open files; they are opened again when they are needed."""
        self.segments.close()


def _room_for(crops: int, levels: Levels) -> list[Tensor]:
    """Tensors fp16 [n, c, h, w] for the levels; in a loader worker in one block of shared memory.

    Otherwise every tensor is copied, and mapped, once more on its way to the main process.
    """
    sizes = [2 * crops * math.prod(level) for level in levels]
    block = torch.empty(0 if get_worker_info() else sum(sizes), dtype=torch.uint8)
    if get_worker_info() and crops:
        block = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(sum(sizes)))
    return [
        part.view(torch.float16).view(crops, *level) for part, level in zip(block.split(sizes), levels, strict=True)
    ]


class SwitchedAttach:
    """A loader's `attach` that looks features up while it is on. Picklable: workers and the process that made it share
    the switch, so that a cache that does not pay is not read any more."""

    def __init__(self, reader: FeatureReader) -> None:
        self.reader = reader
        self._on = torch.ones(1, dtype=torch.uint8).share_memory_()

    @property
    def on(self) -> bool:
        """Whether features are looked up."""
        return bool(self._on)

    def turn_off(self) -> None:
        """No more look-ups, in any process; batches that are on their way still carry theirs."""
        self._on.zero_()

    def __call__(self, batch: dict) -> None:
        if self.on:
            self.reader.attach(batch)
