"""Node-local cache of a frozen teacher's features, filled while training: a planned crop is computed once per node.

The teacher sees the sharp crop, so a record belongs to (image, crop box, flip); teacher, levels, crop plan and stored
form decide the folder, `root/<fingerprint>/`, whose `meta.json` says so in full. Loader workers read (`FeatureReader`),
a thread of the training process appends what was missing (`FeatureWriter`); any number of processes of a node may do
either. Nothing is fsynced: a machine that crashes loses records, and a record's crc32 tells a damaged one from a sound
one. A cache must never stop a training run: disks that are full or read-only end the writing, with one warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import struct
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from data.errors import DataError
from data.feature_codec import DTYPES, Levels, Stored, decode, dequantise, quantise
from data.feature_lookup import SegmentReader
from data.feature_segments import KEY_BYTES, Layout
from data.feature_writer import FeatureWriter, WriteStats
from data.shards import write_atomically

__all__ = [
    "CacheSpec", "FeatureCache", "FeatureReader", "FeatureWriter", "ReadStats", "Stored", "WriteStats", "crop_key",
    "dequantise", "quantise",
]  # fmt: skip

log = logging.getLogger("sharpprior.data")
FORMAT, VERSION = "sharpprior-features", 1
META = "meta.json"
_LOOK_AGAIN_S = 0.5  # between looks at what others have appended
_PROBE_BATCH = 16
_MEMORY_BYTES_PER_S = 1e9  # slower than this, records come from a disk


def crop_key(image: str, box: tuple[int, int, int], flip: bool) -> bytes:
    """16 bytes that name a crop: content id of the image (`ShardSet.image_id`), box (top, left, size) px, mirrored."""
    place = struct.pack("<3q?", *(int(number) for number in box), bool(flip))
    return hashlib.blake2b(place + image.encode(), digest_size=KEY_BYTES).digest()


@dataclass(frozen=True)
class CacheSpec:
    """What a folder of the cache holds: features of which teacher, levels (c, h, w), crop plan, and stored form.

    `teacher` is the teacher's fingerprint, `crops` the facts that decide which crops there are (JSON values), `dtype`
    "fp16" or "int8". Any difference is another fingerprint, hence another folder. Raises DataError.
    """

    teacher: str
    levels: Levels
    crops: dict
    dtype: str = "fp16"

    def __post_init__(self) -> None:
        levels = tuple(tuple(int(number) for number in level) for level in self.levels)
        object.__setattr__(self, "levels", levels)
        if self.dtype not in DTYPES:
            raise DataError(f"feature cache: dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if not levels or any(len(level) != 3 or min(level) < 1 for level in levels):
            raise DataError(f"feature cache: levels {levels}: give (channels, height, width), all ≥ 1, for each level")
        try:
            json.dumps(self.crops, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DataError(f"feature cache: the crop plan's facts are no JSON ({error})") from None

    @property
    def meta(self) -> dict:
        """What meta.json says."""
        facts = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.loads(json.dumps(facts, sort_keys=True))

    @property
    def fingerprint(self) -> str:
        """32 hex digits of everything above and the format's version: the folder's name."""
        text = json.dumps(self.meta, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def layout(self) -> Layout:
        """The form of a record."""
        return Layout(self.fingerprint, self.levels, self.dtype)

    @property
    def record_bytes(self) -> int:
        """Bytes of a record on disk, header included."""
        return self.layout.record_bytes

    @classmethod
    def from_meta(cls, meta: dict) -> CacheSpec:
        """The spec that a meta.json describes; DataError where it does not describe one of this version."""
        try:
            if (meta["format"], meta["version"]) != (FORMAT, VERSION):
                raise DataError(f"format {meta['format']} {meta['version']}, this version reads {FORMAT} {VERSION}")
            return cls(meta["teacher"], meta["levels"], meta["crops"], meta["dtype"])
        except (KeyError, TypeError) as error:
            raise DataError(f"not the meta.json of a feature cache ({error!r})") from None


class FeatureCache:
    """The folder of one spec below `root`, at most `limit_bytes` of segments.

    When they are full, the oldest segments go ("oldest"), or what is there stays and writing ends ("stop"). A plan of
    crops larger than the limit is better served by "stop": a crop returns once in a turn of the plan, and by then the
    oldest have gone (a limit of half the plan: 17 % hits against 50 %).

    A folder that cannot be made or written is no error: `problem` says why, its writers warn once and write nothing.
    Raises DataError if the folder says it is of another spec, or the limit is below eight records.
    """

    def __init__(self, root: str | Path, spec: CacheSpec, *, limit_bytes: int, when_full: str = "oldest") -> None:
        self.root, self.spec, self.limit_bytes = Path(root).expanduser().absolute(), spec, int(limit_bytes)
        self.when_full = when_full
        self.folder = self.root / spec.fingerprint
        self.problem: str | None = None
        self._writers: weakref.WeakSet[FeatureWriter] = weakref.WeakSet()
        if when_full not in ("oldest", "stop"):
            raise DataError(f"feature cache: when_full {when_full!r}: choose oldest (they go) or stop (writing ends)")
        if self.limit_bytes < 8 * spec.record_bytes:
            raise DataError(
                f"feature cache: a limit of {self.limit_bytes} bytes holds fewer than 8 records of {spec.record_bytes} "
                "bytes; raise it"
            )
        try:
            self._prepare()
        except OSError as error:
            self.problem = f"{self.folder}: {error.strerror or error}"

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
        """A writer with a thread and files of its own; `name` (of a rank, say) becomes part of their names."""
        writer = FeatureWriter(
            self.folder,
            self.spec.layout,
            name,
            self.limit_bytes,
            evict=self.when_full == "oldest",
            problem=self.problem,
            prepare=self._prepare,
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
        reader = self.reader()
        reader.segments.refresh()
        keys = [key for key in dict.fromkeys(keys) if key in reader.segments]
        reader.segments.drop_from_memory(keys)
        order = np.random.Generator(np.random.Philox(len(keys))).permutation(len(keys))
        started, read = time.perf_counter(), 0
        for at in range(0, len(keys), _PROBE_BATCH):
            read += sum(reader.read_batch([keys[n] for n in order[at : at + _PROBE_BATCH]])[1])
        seconds = time.perf_counter() - started
        reader.close()
        if not read:
            return math.inf, 0.0
        return seconds / read * 1e3, read * self.spec.record_bytes / seconds / 1e6


@dataclass
class ReadStats:
    """What a reader of one process has done; a damaged record counts once as corrupt, its crop as a miss."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    bytes: int = 0
    seconds: float = 0.0


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
        """Add to a loader batch of B crops what is cached of it.

        `features`: L tensors fp16 [n, c, h, w] of the n crops found, in the batch's order; `feature_hits`: bool [B];
        `feature_read`: {"seconds", "bytes", "corrupt"} of this look-up.
        """
        keys = [
            crop_key(image, tuple(box), flip)
            for image, box, flip in zip(batch["image"], batch["box"].tolist(), batch["flip"].tolist(), strict=True)
        ]
        before = self.stats.seconds, self.stats.bytes, self.stats.corrupt
        levels, hits = self._read_or_miss(keys)
        after = self.stats.seconds, self.stats.bytes, self.stats.corrupt
        change = [now - then for now, then in zip(after, before, strict=True)]
        batch["features"], batch["feature_hits"] = levels, torch.tensor(hits)
        batch["feature_read"] = dict(zip(("seconds", "bytes", "corrupt"), change, strict=True))

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
        started = time.perf_counter()
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
        self.stats.seconds += time.perf_counter() - started
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
