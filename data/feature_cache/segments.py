"""Files of the feature cache: append-only segments of equal records, each with an index that is written after it.

`<stem>.seg` holds records of one size, one after the other; record n starts at byte n · record size:
    crc32 u32 | magic 8 | key 16 | payload bytes u64 | dtype 8 | levels u32 | (c, h, w) u32 each | zeros | payload
`<stem>.idx` holds an entry of 32 bytes a record: magic 4 | key 16 | n u32 | crc32 of the record | crc32 of the entry.
Numbers are little-endian. Every crc32 starts from the folder's fingerprint, so a record or entry of another teacher,
crop plan or dtype is not a record here. An entry is written after its record: what a killed writer leaves is a record
without an entry, or part of an entry, which nobody reads. A writer holds a lock on its index; no file is ever reopened
for writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data.feature_cache.codec import Levels, payload_bytes

try:
    from isal.isal_zlib import crc32  # zlib's numbers, 14 times as fast: checking costs less than reading
except ImportError:
    from zlib import crc32
KEY_BYTES = 16
ENTRY_BYTES = 32
_MAGIC, _ENTRY_MAGIC = b"SPfeat1\n", b"SPi1"
_ALIGN = 64
STEM = re.compile(r"\d{20}-[A-Za-z0-9_.-]+")
_VECTORS = 256  # records a system call; two buffers each, IOV_MAX is 1024
_counter = itertools.count()


class Layout:
    """How a record of one folder looks: sizes, header, checks."""

    def __init__(self, fingerprint: str, levels: Levels, dtype: str) -> None:
        self.levels, self.dtype = levels, dtype
        self.seed = crc32(fingerprint.encode())
        self.payload_bytes = payload_bytes(levels, dtype)
        facts = struct.pack("<Q8sI", self.payload_bytes, dtype.encode(), len(levels))
        facts += struct.pack(f"<{3 * len(levels)}I", *itertools.chain.from_iterable(levels))
        self.header_bytes = -(-(4 + len(_MAGIC) + KEY_BYTES + len(facts)) // _ALIGN) * _ALIGN
        self._facts = facts.ljust(self.header_bytes - 4 - len(_MAGIC) - KEY_BYTES, b"\0")
        self.record_bytes = self.header_bytes + self.payload_bytes

    def header(self, key: bytes, payload: np.ndarray) -> bytes:
        """The header that makes `payload` (uint8 [P]) the record of `key`."""
        rest = _MAGIC + key + self._facts
        return struct.pack("<I", crc32(payload, crc32(rest, self.seed))) + rest

    def sound(self, key: bytes, header: bytearray, parts: Iterable[np.ndarray]) -> bool:
        """Whether header and payload (in parts) are the undamaged record of `key`."""
        rest = memoryview(header)[4:]
        if rest != _MAGIC + key + self._facts:
            return False
        crc = crc32(rest, self.seed)
        for part in parts:
            crc = crc32(part, crc)
        return crc == int.from_bytes(header[:4], "little")

    def entry(self, key: bytes, number: int, header: bytes) -> bytes:
        """Index entry of the record."""
        entry = _ENTRY_MAGIC + key + struct.pack("<I", number) + header[:4]
        return entry + struct.pack("<I", crc32(entry, self.seed))

    def keys(self, entries: bytes, first: int) -> list[bytes | None]:
        """Keys of whole index entries, of which the first belongs to record `first`; None for a damaged one."""
        keys: list[bytes | None] = []
        for at in range(0, len(entries), ENTRY_BYTES):
            entry = entries[at : at + ENTRY_BYTES]
            number = struct.pack("<I", first + at // ENTRY_BYTES)
            crc = struct.pack("<I", crc32(entry[:28], self.seed))
            whole = entry[:4] == _ENTRY_MAGIC and entry[20:24] == number and entry[28:] == crc
            keys.append(entry[4:20] if whole else None)
        return keys


# -- writing ----------------------------------------------------------------------------------------------------------
class SegmentWriter:
    """One new segment and its index; nobody else ever writes these files. Raises OSError as the disk does."""

    def __init__(self, folder: Path, layout: Layout, name: str) -> None:
        self.layout, self.count, self.bytes = layout, 0, 0
        who = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{socket.gethostname()[:40]}-{os.getpid()}-{next(_counter)}-{name[:40]}")
        self.stem = f"{time.time_ns():020d}-{who}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        # Locked before it has its name: whoever sees an index without a lock sees one that grows no more.
        self._index = os.open(folder / f"{self.stem}.new", flags, 0o644)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._data = os.open(folder / f"{self.stem}.seg", flags, 0o644)
            os.rename(folder / f"{self.stem}.new", folder / f"{self.stem}.idx")
        except OSError:
            os.close(self._index)
            remove_segment(folder, self.stem)
            raise

    def append(self, keys: Sequence[bytes], payloads: Sequence[np.ndarray]) -> None:
        """Write records (payloads uint8 [P]), then publish them."""
        for start in range(0, len(keys), _VECTORS):
            some = slice(start, start + _VECTORS)
            headers = [self.layout.header(*record) for record in zip(keys[some], payloads[some], strict=True)]
            buffers = list(itertools.chain.from_iterable(zip(headers, payloads[some], strict=True)))
            try:
                _write_all(self._data, buffers, self.count * self.layout.record_bytes)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._data, self.count * self.layout.record_bytes)
                raise
            entries = b"".join(
                self.layout.entry(key, self.count + n, header)
                for n, (key, header) in enumerate(zip(keys[some], headers, strict=True))
            )
            _write_all(self._index, [entries], self.count * ENTRY_BYTES)
            self.count += len(headers)
            self.bytes = self.count * (self.layout.record_bytes + ENTRY_BYTES)

    @property
    def removed(self) -> bool:
        """Whether somebody has deleted the files, so that what is written goes nowhere."""
        return os.fstat(self._index).st_nlink == 0 or os.fstat(self._data).st_nlink == 0

    def close(self) -> None:
        """Close the files; the lock goes with them."""
        for file in (self._data, self._index):
            with contextlib.suppress(OSError):  # a network file system may say only now that its disk is full
                os.close(file)


def _write_all(file: int, buffers: list, offset: int) -> None:
    """pwritev until everything is written; a disk that fills up writes a part first and fails at the next call."""
    while buffers:
        written = os.pwritev(file, buffers, offset)
        if written == 0:
            raise OSError(5, "the disk takes no more bytes")
        offset += written
        while buffers and written >= memoryview(buffers[0]).nbytes:
            written -= memoryview(buffers.pop(0)).nbytes
        if written:
            buffers[0] = memoryview(buffers[0]).cast("B")[written:]


def locked(folder: Path, stem: str) -> bool:
    """Whether a living writer holds this segment."""
    for kind in ("new", "idx"):  # in the order of their life
        with contextlib.suppress(OSError):
            file = os.open(folder / f"{stem}.{kind}", os.O_RDONLY)
            try:
                if held(file):
                    return True
            finally:
                os.close(file)
    return False


def held(file: int) -> bool:
    """Whether a living writer holds the index opened as `file`."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: it may still grow
        return True
    return False


def stems(folder: Path) -> dict[str, int]:
    """Segments of a folder, oldest first, and their bytes, index included; {} where there is no folder."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            stem, _, kind = entry.name.rpartition(".")
            if kind in ("seg", "idx", "new") and STEM.fullmatch(stem):
                with contextlib.suppress(OSError):  # removed meanwhile
                    found[stem] = found.get(stem, 0) + entry.stat(follow_symlinks=False).st_size
    return dict(sorted(found.items()))


def remove_segment(folder: Path, stem: str) -> None:
    """Delete a segment; the index first, so that nobody is sent to a segment that has gone."""
    for kind in ("idx", "new", "seg"):
        with contextlib.suppress(OSError):
            (folder / f"{stem}.{kind}").unlink()
