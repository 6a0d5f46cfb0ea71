"""Shard sets: WebDataset tars beside an `index.json` that says what each byte is.

A set is a folder: `<name>.tar` files that any webdataset reader can read, and the index: for each shard its size,
sha256, keys, and for each member (jpg, json, sharp.png, ...) offset, size and crc32. Readers `pread` members by offset
and check the crc32, so a flipped byte never reaches a batch. Writers write `.tmp`, fsync, rename: a killed writer
leaves no torn shard.
"""

import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.formats import is_image
from data.shards.tar import INDEX

FORMAT, VERSION = "sharpprior-shards", 2  # 1 had no digest; it is read still
NOT_INDEXED = "not in the index, so not used; `sharpprior index --add` takes it in, or remove it"
_LARGEST = 1 << 20  # px a side: more is no picture but damage
log = logging.getLogger("sharpprior.data")
_RESTORE = "restore it, or make the set again with `sharpprior prepare`"


# -- reading ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shard:
    """One shard as the index describes it; `members[ext]` is int64 [n, 3] of (offset, size, crc32), −1 where absent."""

    name: str
    bytes: int
    sha256: str
    keys: tuple[str, ...]
    heights: np.ndarray
    widths: np.ndarray
    members: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def from_record(cls, record: Mapping) -> "Shard":
        """Build from one record of index.json."""
        members = {
            ext: np.array([row or (-1, -1, -1) for row in rows], np.int64).reshape(-1, 3)
            for ext, rows in record["members"].items()
        }
        sizes = (np.array(record[name], np.int32) for name in ("heights", "widths"))
        shard = cls(record["name"], int(record["bytes"]), record["sha256"], tuple(record["keys"]), *sizes, members)
        shard._check()
        return shard

    def _check(self) -> None:
        """ValueError for what no tar can hold, so that nothing is read or allocated by it."""
        if not isinstance(self.name, str) or os.path.basename(self.name) != self.name or self.name in ("", ".", ".."):
            raise ValueError(f"shard name {self.name!r} leaves the folder")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 of {self.name} is {self.sha256!r}")
        if not all(isinstance(key, str) for key in self.keys):
            raise ValueError(f"keys of {self.name} are not all text")
        if any(len(column) != len(self.keys) for column in (self.heights, self.widths, *self.members.values())):
            raise ValueError(f"columns of {self.name} differ in length")
        for side in (self.heights, self.widths):
            if len(side) and not (side.min() > 0 and side.max() <= _LARGEST):
                raise ValueError(f"picture sizes in {self.name} are impossible")
        for ext, rows in self.members.items():
            offset, size, crc = rows[rows[:, 0] != -1].T
            if not ((offset >= 0) & (size >= 0) & (offset + size <= self.bytes) & (crc >= 0) & (crc < 1 << 32)).all():
                raise ValueError(f"places of {ext} lie outside {self.name}")


class ShardSet:
    """An opened set: its shards, its samples numbered 0..len-1 in index order, and reads of single members.

    `path` is the set's folder, its index.json, or a URL of either that fsspec can open; a remote set needs a `cache`
    (data.shards.remote.ShardCache). `check=True` compares every local shard's size with the index at once. Raises
    DataError.
    """

    def __init__(self, path: str | Path, *, cache=None, check: bool = True) -> None:
        self.location = str(path).removeprefix("file://")
        path = Path(self.location)
        self.remote = "://" in self.location
        if self.remote and cache is None:
            raise DataError(
                f"{self.location}: a remote set needs a node-local cache; give cache=ShardCache(folder, limit)"
            )
        self.cache = cache
        raw = cache.fetch_index(self.location) if self.remote else self._read_local_index(path)
        self.digest = hashlib.sha256(raw).hexdigest()
        self.info, self.shards = _parse_index(raw, self.location)
        self.starts = np.concatenate([[0], np.cumsum([len(shard) for shard in self.shards])]).astype(np.int64)
        self.kind = "pairs" if any(ext.startswith("blurry.") for s in self.shards for ext in s.members) else "sharp"
        self._files: dict[int, int] = {}
        if len(self) == 0:
            raise DataError(
                f"{self.location}: the index lists no samples; make the set again with `sharpprior prepare`"
            )
        if check and not self.remote:
            for problem in self.shard_problems().values():
                raise DataError(problem)
        if not self.remote and (beside := self.unindexed()):
            log.warning("%s: %s: %s", self.location, ", ".join(beside), NOT_INDEXED)

    def _read_local_index(self, path: Path) -> bytes:
        index = path if path.suffix == ".json" else path / INDEX
        self.root = index.parent
        if not path.exists():
            raise DataError(f"{path}: no such data; give the folder of a shard set (made by `sharpprior prepare`)")
        if path.is_file() and path != index:
            raise DataError(f"{path}: a file; give the folder of the shard set")
        if not index.is_file():
            raise DataError(f"{path}: no {INDEX} here; make it with `sharpprior index {path}`")
        try:
            return index.read_bytes()
        except OSError as error:
            raise DataError(f"{index}: cannot be read ({error.strerror}); mend its permissions") from None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __repr__(self) -> str:
        return f"ShardSet({self.location!r}, {self.kind}, {len(self)} samples in {len(self.shards)} shards)"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}  # file descriptors do not travel to another process

    def locate(self, number: int) -> tuple[int, int]:
        """(shard number, row in it) of sample `number`."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, int(number - self.starts[shard])

    def key(self, number: int) -> str:
        """Key of sample `number`."""
        shard, row = self.locate(number)
        return self.shards[shard].keys[row]

    def name(self, number: int) -> str:
        """`<shard>: sample <key>`, the way errors and reports name a sample."""
        shard, row = self.locate(number)
        return f"{self.location}/{self.shards[shard].name}: sample {self.shards[shard].keys[row]}"

    def size(self, number: int) -> tuple[int, int]:
        """(height, width) in px of sample `number`, from the index."""
        shard, row = self.locate(number)
        return int(self.shards[shard].heights[row]), int(self.shards[shard].widths[row])

    def shard_problems(self) -> dict[int, str]:
        """Local shards that are missing or whose size is not the index's: {shard number: one line}."""
        problems = {}
        for number, shard in enumerate(self.shards if not self.remote else ()):
            path = self.root / shard.name
            if not path.is_file():
                problems[number] = (
                    f"{path}: the shard is missing; restore it, or make the set again with `sharpprior prepare`"
                )
            elif (found := path.stat().st_size) != shard.bytes:
                problems[number] = f"{path}: torn shard, {found} bytes, the index says {shard.bytes}; {_RESTORE}"
        return problems

    def unindexed(self) -> list[str]:
        """Names of tars (and what a killed writer left of one) in a local set's folder that the index does not list."""
        known = {shard.name for shard in self.shards}
        return sorted(
            path.name
            for path in self.root.iterdir()
            if ".tar" in path.name.lower() and path.name not in known and path.is_file()
        )

    def shard_path(self, shard: int) -> Path:
        """Local path of a shard, fetched into the cache first where the set is remote."""
        return (
            self.cache.fetch(self.location, self.shards[shard]) if self.remote else self.root / self.shards[shard].name
        )

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= 64:  # far below any limit on open files; the oldest goes
                os.close(self._files.pop(next(iter(self._files))))
            if self.remote:
                # An evicted copy holds its disk space for as long as it stays open.
                for number in [n for n, file in self._files.items() if os.fstat(file).st_nlink == 0]:
                    os.close(self._files.pop(number))
                self._files[shard] = self.cache.open(self.location, self.shards[shard])
                return self._files[shard]
            try:
                self._files[shard] = os.open(self.shard_path(shard), os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{self.root / self.shards[shard].name}: {error.strerror}; {_RESTORE}") from None
        return self._files[shard]

    def extensions(self, number: int) -> list[str]:
        """The members sample `number` has, such as ["jpg", "json"]."""
        shard, row = self.locate(number)
        return [ext for ext, rows in self.shards[shard].members.items() if rows[row, 0] >= 0]

    def read(self, number: int, ext: str) -> bytes:
        """Bytes of one member, checked against its size and crc32; DataError names shard and sample."""
        shard, row = self.locate(number)
        offset, size, crc = (int(value) for value in self.shards[shard].members[ext][row])
        data = os.pread(self._file(shard), size, offset)
        if self.remote and zlib.crc32(data) != crc:  # the node's copy was damaged since it was fetched
            os.close(self._files.pop(shard))
            self.cache.fetch_again(self.location, self.shards[shard])
            data = os.pread(self._file(shard), size, offset)
        if len(data) != size:
            raise DataError(f"{self.name(number)}.{ext}: torn shard, {len(data)} of {size} bytes; {_RESTORE}")
        if zlib.crc32(data) != crc:
            raise DataError(f"{self.name(number)}.{ext}: damaged (its crc32 is not the index's); {_RESTORE}")
        return data

    def image_member(self, number: int, role: str | None = None) -> str:
        """Extension of the image of sample `number`: of a role ("sharp", "blurry") in a pair."""
        # A plain jpg comes before a mask.png that foreign tars may hold beside it.
        for ext in sorted(self.extensions(number), key=lambda ext: "." in ext):
            if is_image(ext) and (role is None or ext.startswith(role + ".")):
                return ext
        raise DataError(f"{self.name(number)}: no {role or ''} image among its members; make the set again")

    def image_id(self, number: int) -> str:
        """Name of the sample's sharp image by its content: key and crc32, for caches of what was computed from it."""
        shard, row = self.locate(number)
        ext = self.image_member(number, "sharp" if self.kind == "pairs" else None)
        return f"{self.shards[shard].keys[row]}-{int(self.shards[shard].members[ext][row, 2]):08x}"

    def close(self) -> None:
        """Close the open shard files."""
        while self._files:
            os.close(self._files.popitem()[1])


def digest_of_index(index: Mapping) -> str:
    """sha256 of all that an index says, but for its own `digest`."""
    content = {name: value for name, value in index.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def _parse_index(raw: bytes, location: str) -> tuple[dict, list[Shard]]:
    try:
        index = json.loads(raw)
        found = (index.get("format"), index.get("version"))
        if found not in ((FORMAT, 1), (FORMAT, VERSION)):
            raise DataError(
                f"{location}: index of format {found}, this version reads {(FORMAT, VERSION)}; make the set again"
            )
        if found[1] == VERSION and index.get("digest") != digest_of_index(index):
            raise ValueError("damaged or edited: its digest is another")
        return index["info"], [Shard.from_record(record) for record in index["shards"]]
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{location}: {INDEX} does not read ({error}); restore it, or make it anew with `sharpprior index "
            "--overwrite`"
        ) from None
