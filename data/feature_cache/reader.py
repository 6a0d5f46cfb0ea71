"""Looking cached features up for a loader's batches, and the switch that ends it."""

from __future__ import annotations

import logging
import math
import os
import sqlite3
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
from data.feature_cache.spec import CacheSpec, crop_keys
from data.feature_cache.store import Store

log = logging.getLogger("sharpprior.data")


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
        self.spec, self.store = spec, Store(folder, spec.fingerprint, spec.payload_bytes)
        self._count_anew()

    def _count_anew(self) -> None:
        self.stats, self._failed, self._process = ReadStats(), False, os.getpid()

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self._count_anew()

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
            self._count_anew()  # of a forked child
        payloads = [self._payload(key) for key in keys]
        hits = [payload is not None for payload in payloads]
        found = [payload for payload in payloads if payload is not None]
        stored = torch.empty(len(found), self.spec.payload_bytes, dtype=torch.uint8)
        for row, payload in zip(stored.numpy(), found, strict=True):
            row[:] = np.frombuffer(payload, np.uint8)
        levels = _room_for(len(found), self.spec.levels)
        decoded = decode(stored, self.spec.levels, self.spec.dtype)
        for level, values in zip(levels, decoded, strict=True):
            level.copy_(values)
        self.stats.hits += len(found)
        self.stats.misses += len(keys) - len(found)
        self.stats.bytes += len(found) * self.spec.record_bytes
        return levels, hits

    def _payload(self, key: bytes) -> bytes | None:
        """A record's payload; None, and counted, for one that is damaged or cannot be read."""
        try:
            return self.store.get(key)
        except (ValueError, sqlite3.Error):
            self.stats.corrupt += 1
            return None

    def close(self) -> None:
        """Close the file; it is opened again when it is needed."""
        self.store.close()


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
