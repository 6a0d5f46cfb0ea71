"""Node-local cache of a frozen teacher's features, filled while training: a planned crop is computed once per node.

The teacher sees the sharp crop, so a record belongs to (image, crop box, flip); teacher, levels, crop plan and stored
form decide the folder, `root/<fingerprint>/`, whose `meta.json` says so in full. Loader workers read (`FeatureReader`),
a thread of the training process writes what was missing (`FeatureWriter`); any number of processes of a node may do
either, in one SQLite file (`Store`). A cache must never stop a training run: disks that are full or read-only, and
files that are damaged, end the writing, with one warning.
"""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.feature_cache.reader import FeatureReader
from data.feature_cache.spec import META, CacheSpec
from data.feature_cache.store import Store
from data.feature_cache.writer import FeatureWriter
from data.files import write_atomically

log = logging.getLogger("sharpprior.data")
_PROBE_BATCH = 16


class FeatureCache:
    """The folder of one spec below `root`, at most `limit_bytes` large.

    When it is full, what is there stays and writing ends: a crop returns once in a turn of the plan, and by then the
    oldest would have gone (a limit of half the plan: 17 % hits against 50 %).

    A folder that cannot be made or written is no error: `problem` says why, its writers warn once and write nothing.
    Raises DataError if the folder says it is of another spec, or the limit is below eight records.
    """

    def __init__(self, root: str | Path, spec: CacheSpec, *, limit_bytes: int) -> None:
        self.root, self.spec, self.limit_bytes = Path(root).expanduser().absolute(), spec, int(limit_bytes)
        self.folder = self.root / spec.fingerprint
        self.problem: str | None = None
        self._writers: weakref.WeakSet[FeatureWriter] = weakref.WeakSet()
        if self.limit_bytes < 8 * spec.record_bytes:
            raise DataError(
                f"feature cache: a limit of {self.limit_bytes} bytes holds fewer than 8 records of {spec.record_bytes} "
                "bytes; raise it"
            )
        try:
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            self.problem = f"{self.folder}: {getattr(error, 'strerror', None) or error}"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_writers": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state | {"_writers": weakref.WeakSet()}  # writers stay in their process

    def _prepare(self) -> None:
        """Make the folder, and what says whose it is; or check that."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / META
        if not path.exists():
            try:
                write_atomically(path, json.dumps(self.spec.meta, indent=1, sort_keys=True).encode())
            except OSError:
                if not path.exists():  # else another process was faster
                    raise
        found = path.read_bytes()
        try:
            same = json.loads(found) == self.spec.meta
        except ValueError:
            same = False
        if not same:
            raise DataError(
                f"{path}: does not describe this run's features though the folder has their name, so it was damaged or "
                "edited; remove the folder with `sharpprior cache clear`"
            )
        store = Store(self.folder, self.spec.fingerprint, self.spec.payload_bytes)
        store.put([], [])  # makes the file, before anybody reads it
        store.close()

    def others(self) -> dict[str, list[str]]:
        """The other folders below the root, {fingerprint: names of what differs from this one's spec}."""
        found, mine = {}, self.spec.meta
        for path in sorted(self.root.glob(f"*/{META}")):
            if path.parent != self.folder:
                try:
                    theirs = json.loads(path.read_bytes())
                    found[path.parent.name] = [name for name in mine if theirs.get(name) != mine[name]]
                except (OSError, ValueError, AttributeError):
                    found[path.parent.name] = [META]
        return found

    def reader(self) -> FeatureReader:
        """A reader; picklable, it opens the folder in the process that uses it."""
        return FeatureReader(self.folder, self.spec)

    def writer(self, name: str) -> FeatureWriter:
        """A writer with a thread of its own; `name` (of a rank, say) is the thread's."""
        writer = FeatureWriter(
            self.folder, self.spec, name, self.limit_bytes, problem=self.problem, prepare=self._prepare
        )
        self._writers.add(writer)
        return writer

    def probe(self, keys: Sequence[bytes]) -> tuple[float, float]:
        """(ms per record, MB/s) of reading these records from the disk, not from memory, decoded and in random order.

        Writes of this process are flushed first and the records dropped from the page cache (where the file system
        has one: a tmpfs is memory). (inf, 0) where none of the keys can be read.
        """
        for writer in list(self._writers):
            writer.flush()
        reader, keys = self.reader(), list(dict.fromkeys(keys))
        reader.store.drop_from_memory()
        order = np.random.Generator(np.random.Philox(len(keys))).permutation(len(keys))
        started, read = time.perf_counter(), 0
        for at in range(0, len(keys), _PROBE_BATCH):
            read += sum(reader.read_batch([keys[n] for n in order[at : at + _PROBE_BATCH]])[1])
        seconds = time.perf_counter() - started
        reader.close()
        if not read:
            return math.inf, 0.0
        return seconds / read * 1e3, read * self.spec.record_bytes / seconds / 1e6
