"""The background writer of the feature cache: takes batches at once, appends them in a thread of its own."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.errors import DataError
from data.feature_cache.codec import Stored
from data.feature_cache.spec import CacheSpec
from data.feature_cache.store import Store, WritingLock

log = logging.getLogger("sharpprior.data")
_QUEUE_BYTES = 256 << 20


@dataclass
class WriteStats:
    """What a writer has done: records written and their bytes; records not written because the queue was full or the
    writing had stopped (dropped), the stored form cannot hold them (unstorable), or they were there (duplicates)."""

    written: int = 0
    bytes: int = 0
    dropped: int = 0
    unstorable: int = 0
    duplicates: int = 0


class FeatureWriter:
    """Appends records to a folder of the cache from a background thread; never raises for what the disk does.

    `stopped` is None, or says in a few words why nothing is written any more. Belongs to the process that made it.
    """

    def __init__(
        self,
        folder: Path,
        spec: CacheSpec,
        name: str,
        limit_bytes: int,
        *,
        problem: str | None = None,
        prepare: Callable[[], None] = lambda: None,
        queue_bytes: int = _QUEUE_BYTES,
    ) -> None:
        self.folder, self.name, self.stats = folder, name, WriteStats()
        self.stopped: str | None = None
        self._prepare = prepare  # makes the folder, which may have been deleted since
        self._spec, self._limit, self._queue_bytes = spec, limit_bytes, queue_bytes
        self._store = Store(folder, spec.fingerprint, spec.payload_bytes)
        self._lock: WritingLock | None = None
        self._waiting: deque[tuple[list[bytes], torch.Tensor, torch.Tensor, object]] = deque()
        self._waiting_bytes, self._busy, self._closed = 0, False, False
        self._changed, self._process = threading.Condition(), os.getpid()
        self._thread: threading.Thread | None = None
        if problem is not None:
            self._stop(problem)

    def put(self, keys: Sequence[bytes], stored: Stored) -> None:
        """Take the records of a batch and return; what does not fit into the queue is dropped and counted.

        Features on a GPU are copied to pinned memory behind the work of the current stream. Raises DataError for
        features of another form than the cache's.
        """
        spec = self._spec
        if (stored.levels, stored.dtype) != (spec.levels, spec.dtype):
            raise DataError(
                f"feature cache: features {stored.dtype} {stored.levels} are not the cache's {spec.dtype} "
                f"{spec.levels}; make the spec from the teacher that computes them"
            )
        if len(keys) != len(stored.payload):
            raise DataError(f"feature cache: {len(keys)} keys for {len(stored.payload)} crops; give one a crop")
        assert self._process == os.getpid(), "a writer belongs to the process that made it"
        assert not self._closed, "the writer is closed"
        size = len(keys) * spec.payload_bytes
        with self._changed:
            full = self._waiting_bytes > 0 and self._waiting_bytes + size > self._queue_bytes
            if self.stopped is not None or full:
                self.stats.dropped += len(keys)
                return
            self._waiting_bytes += size
        try:
            waiting = (list(keys), *_to_host(stored))
        except RuntimeError as error:  # no pinned memory left
            self._stop(_reason(error, self.folder))
            waiting = None
        with self._changed:
            if waiting is None:
                self._waiting_bytes -= size
                self.stats.dropped += len(keys)
                return
            self._waiting.append(waiting)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"features-{self.name}", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Wait until everything that was put is readable by others, or dropped."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy)

    def close(self) -> None:
        """Flush, end the thread, close the files."""
        self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._end()

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                keys, payload, storable, copied = self._waiting.popleft()
                self._busy = True
            try:
                if copied is not None:
                    copied.synchronize()
                self._write(keys, payload.numpy(), storable.numpy())
            except Exception as error:  # whatever it is, it is the cache's trouble and not the training's
                self._stop(_reason(error, self.folder))
                self._end()
            with self._changed:
                self._waiting_bytes -= len(keys) * self._spec.payload_bytes
                self._busy = False
                self._changed.notify_all()

    def _write(self, keys: list[bytes], payloads: np.ndarray, storable: np.ndarray) -> None:
        if self.stopped is not None:
            self.stats.dropped += len(keys)
            return
        if not self._store.path.exists():
            self._prepare()
            self._end()
        if self._lock is None:
            self._lock = WritingLock(self.folder)
        rows: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if not storable[row]:
                self.stats.unstorable += 1
            # Read before it is believed: a damaged record that is reported missing must be written again.
            elif key in rows or self._sound(key):
                self.stats.duplicates += 1
            else:
                rows[key] = row
        room = self._store.room(self._limit)
        some = list(rows.items())[:room]
        if some:
            self._store.put([key for key, _ in some], [payloads[row] for _, row in some])
        self.stats.written += len(some)
        self.stats.bytes += len(some) * self._spec.record_bytes
        if len(some) < len(rows):
            self.stats.dropped += len(rows) - len(some)
            self._stop(f"{self.folder} has reached features.limit_gib, {self._limit / 2**30:.2f} GiB")

    def _sound(self, key: bytes) -> bool:
        try:
            return self._store.get(key) is not None
        except ValueError:
            return False

    def _end(self) -> None:
        self._store.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _stop(self, reason: str) -> None:
        if self.stopped is None:
            self.stopped = reason
            log.warning("feature cache: writing stops (%s); training goes on with what is cached", reason)


def _to_host(stored: Stored) -> tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]:
    if stored.payload.device.type != "cuda":
        return stored.payload.cpu(), stored.storable.cpu(), None
    host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (stored.payload, stored.storable)]
    for target, tensor in zip(host, (stored.payload, stored.storable), strict=True):
        target.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host[0], host[1], copied


def _reason(error: Exception, folder: Path) -> str:
    if isinstance(error, OSError | sqlite3.Error):
        return f"{folder}: {getattr(error, 'strerror', None) or error}"
    return f"{type(error).__name__}: {error}"
