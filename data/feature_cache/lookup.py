"""Looking records up in the segments of a folder, while other processes append to it and delete from it."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data.feature_cache.segments import ENTRY_BYTES, STEM, Layout, held

_OPEN_FILES = 128


class _Tail:
    """How far one segment's index has been read."""

    def __init__(self, number: int) -> None:
        self.number, self.entries, self.final = number, 0, False


class SegmentReader:
    """All segments of a folder, read by key; records that other processes append are found by `refresh`.

    Opened lazily; holds nothing that may not be forked. `corrupt` counts damaged records and index entries met.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout, self.corrupt = folder, layout, 0
        self._where: dict[bytes, int] = {}  # segment number << 32 | record number
        self._copies: dict[bytes, list[int]] = {}  # of keys written more than once: the later ones
        self._tails: dict[str, _Tail] = {}
        self._stems: dict[int, str] = {}
        self._files: OrderedDict[int, int] = OrderedDict()
        self._header = bytearray(layout.header_bytes)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def refresh(self) -> None:
        """Take in what was appended, by whom ever, and forget segments that were deleted."""
        try:
            names = sorted(os.listdir(self.folder))
        except OSError:
            names = []
        there = {name[:-4] for name in names if name.endswith(".idx") and STEM.fullmatch(name[:-4])}
        gone = [stem for stem in self._tails if stem not in there]
        if gone:
            self._forget(gone)
        for stem in sorted(there):
            if stem not in self._tails:
                number = len(self._stems)
                self._tails[stem] = _Tail(number)
                self._stems[number] = stem
            if not self._tails[stem].final:
                self._read_tail(stem, self._tails[stem])

    def _forget(self, gone: list[str]) -> None:
        numbers = {self._tails.pop(stem).number for stem in gone}
        for number in numbers & self._files.keys():
            os.close(self._files.pop(number))  # deleted, but its bytes stay on the disk until it is closed
        kept: dict[bytes, int] = {}
        for key, first in self._where.items():
            places = [place for place in (first, *self._copies.pop(key, ())) if place >> 32 not in numbers]
            if places:
                kept[key] = places[0]
                if len(places) > 1:
                    self._copies[key] = places[1:]
        self._where = kept

    def _read_tail(self, stem: str, tail: _Tail) -> None:
        try:
            file = os.open(self.folder / f"{stem}.idx", os.O_RDONLY)
        except OSError:
            return
        try:
            final = not held(file)  # asked first: what is read after it is all there will be
            size = os.fstat(file).st_size // ENTRY_BYTES * ENTRY_BYTES
            start = tail.entries * ENTRY_BYTES
            entries = _read_some(file, max(size - start, 0), start)
        except OSError:
            return
        finally:
            os.close(file)
        keys = self.layout.keys(entries[: len(entries) // ENTRY_BYTES * ENTRY_BYTES], tail.entries)
        if not final:
            while keys and keys[-1] is None:  # perhaps still being written
                keys.pop()
        for n, key in enumerate(keys, tail.entries):
            if key is None:
                self.corrupt += 1
            elif key in self._where:
                self._copies.setdefault(key, []).append(tail.number << 32 | n)
            else:
                self._where[key] = tail.number << 32 | n
        tail.entries += len(keys)
        tail.final = final

    def place(self, key: bytes) -> tuple[int, int] | None:
        """(file descriptor, offset) of the key's record, None where there is none."""
        while (where := self._where.get(key)) is not None:
            file = self._file(where >> 32)
            if file is not None:
                return file, (where & 0xFFFFFFFF) * self.layout.record_bytes
            self._drop(key)
        return None

    def _file(self, number: int) -> int | None:
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        while len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        try:
            self._files[number] = os.open(self.folder / f"{self._stems[number]}.seg", os.O_RDONLY)
        except OSError:
            return None
        return self._files[number]

    def _drop(self, key: bytes) -> None:
        """Forget the key's record; the next copy of it takes its place."""
        copies = self._copies.get(key)
        if copies:
            self._where[key] = copies.pop(0)
        else:
            self._copies.pop(key, None)
            del self._where[key]

    def read(self, key: bytes, parts: Sequence[np.ndarray]) -> bool:
        """Read the key's payload into `parts` (contiguous, P bytes together); False where no sound record is.

        A damaged record is counted and forgotten, so that its place can be taken by a new one.
        """
        while (place := self.place(key)) is not None:
            if self._sound_at(*place, key, parts):
                return True
            self.corrupt += 1
            self._drop(key)
        return False

    def _sound_at(self, file: int, offset: int, key: bytes, parts: Sequence[np.ndarray]) -> bool:
        try:
            whole = os.preadv(file, [self._header, *parts], offset) == self.layout.record_bytes
        except OSError:
            return False
        return whole and self.layout.sound(key, self._header, parts)

    def every_record(self, payload: np.ndarray) -> Iterator[tuple[str, int, bool]]:
        """(segment's stem, record number, sound) of all indexed records, a key's copies too, in order."""
        everything = [
            (place, key) for key, first in self._where.items() for place in (first, *self._copies.get(key, ()))
        ]
        for place, key in sorted(everything):
            file, number = self._file(place >> 32), place & 0xFFFFFFFF
            sound = file is not None and self._sound_at(file, number * self.layout.record_bytes, key, [payload])
            yield self._stems[place >> 32], number, sound

    def ask_for(self, keys: Iterable[bytes]) -> None:
        """Have the kernel read these records ahead, all at once, as a disk likes it."""
        for key in keys:
            if (place := self.place(key)) is not None:
                with contextlib.suppress(OSError):  # a file system that takes no advice
                    os.posix_fadvise(*place, self.layout.record_bytes, os.POSIX_FADV_WILLNEED)

    def drop_from_memory(self, keys: Iterable[bytes]) -> None:
        """Write these records to the disk and take them out of the page cache, so that they are read from the disk."""
        places = [place for place in map(self.place, keys) if place is not None]
        for file in {file for file, _ in places}:
            with contextlib.suppress(OSError):
                os.fdatasync(file)
        for file, offset in places:
            with contextlib.suppress(OSError):
                os.posix_fadvise(file, offset, self.layout.record_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the open segments; they are opened again when they are needed."""
        while self._files:
            os.close(self._files.popitem()[1])


def _read_some(file: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes at `offset`: one pread gives at most 2 GiB."""
    pieces = []
    while size > 0 and (piece := os.pread(file, min(size, 1 << 26), offset)):
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return b"".join(pieces)
