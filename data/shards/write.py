"""Writing shards and their index."""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from data.errors import DataError
from data.files import replacing, write_atomically
from data.formats import is_image
from data.image import image_size
from data.shards.set import FORMAT, VERSION, digest_of_index
from data.shards.tar import _BLOCK, INDEX, KEY, MAX_KEY


def _check_sample(key: str, members: Mapping[str, bytes]) -> None:
    if not KEY.fullmatch(key) or len(key) > MAX_KEY:
        raise DataError(
            f"sample key {key!r}: use 1 to {MAX_KEY} of 0-9, a-z and _ (webdataset merges keys with other signs)"
        )
    if not members:
        raise DataError(f"sample {key}: it has no members; give at least an image")


def _sample_size(key: str, members: Mapping[str, bytes]) -> tuple[int, int]:
    sizes = {ext: image_size(data, f"sample {key}.{ext}") for ext, data in members.items() if is_image(ext)}
    if not sizes:
        raise DataError(f"sample {key}: no image among its members {sorted(members)}; add a jpg or png")
    if len(set(sizes.values())) > 1:
        raise DataError(f"sample {key}: its images differ in size {sizes}; a pair must match pixel by pixel")
    return next(iter(sizes.values()))


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> dict:
    """Write one shard atomically from (key, {extension: bytes}) and return its index record.

    Equal samples give equal bytes. Raises DataError for a bad or repeated key and for a sample without an image.
    """
    record: dict = {"name": path.name, "bytes": 0, "sha256": "", "keys": [], "heights": [], "widths": [], "members": {}}
    digest, offset, seen = hashlib.sha256(), 0, set()
    with replacing(path) as temporary, open(temporary, "wb") as file:

        def put(data: bytes) -> None:
            nonlocal offset
            file.write(data)
            digest.update(data)
            offset += len(data)

        for number, (key, members) in enumerate(samples):
            _check_sample(key, members)
            if key in seen:
                raise DataError(f"{path}: sample key {key!r} comes twice; keys must be unique in a set")
            seen.add(key)
            height, width = _sample_size(key, members)
            for column, value in (("keys", key), ("heights", height), ("widths", width)):
                record[column].append(value)
            for ext, data in members.items():
                header = tarfile.TarInfo(f"{key}.{ext}")  # mtime, uid, gid stay 0: the same bytes on every machine
                header.size, header.mode = len(data), 0o644
                put(header.tobuf(tarfile.USTAR_FORMAT))
                rows = record["members"].setdefault(ext, [])
                rows.extend([None] * (number - len(rows)))
                rows.append([offset, len(data), zlib.crc32(data)])
                put(data + bytes(-len(data) % _BLOCK))
        put(bytes(2 * _BLOCK + -(offset + 2 * _BLOCK) % tarfile.RECORDSIZE))
    for rows in record["members"].values():
        rows.extend([None] * (len(record["keys"]) - len(rows)))
    return {**record, "bytes": offset, "sha256": digest.hexdigest()}


def write_index(root: Path, records: Iterable[dict], info: Mapping | None = None) -> Path:
    """Write `index.json` of the shard records (in the order given) atomically; `info` is free text about the set."""
    index = {"format": FORMAT, "version": VERSION, "info": dict(info or {}), "shards": list(records)}
    keys: set[str] = set()
    for shard in index["shards"]:
        for key in shard["keys"]:
            if key in keys:
                raise DataError(
                    f"{root}: sample key {key!r} comes twice (again in {shard['name']}); keys must be unique in a set"
                )
            keys.add(key)
    index["digest"] = digest_of_index(index)
    path = Path(root) / INDEX
    write_atomically(path, json.dumps(index, separators=(",", ":"), sort_keys=True) + "\n")
    return path


class ShardWriter:
    """Write a set sample by sample: a new shard at `shard_bytes`; `close` (or leaving `with`) writes the index.

    Leaving `with` on an exception writes no index: a half-written set is not a set.
    """

    def __init__(
        self, root: str | Path, prefix: str = "shard", shard_bytes: int = 512 << 20, info: Mapping | None = None
    ):
        self.root, self.prefix, self.shard_bytes, self.info = Path(root), prefix, shard_bytes, dict(info or {})
        self.records: list[dict] = []
        self._waiting: list[tuple[str, dict[str, bytes]]] = []
        self._waiting_bytes = 0
        self.root.mkdir(parents=True, exist_ok=True)

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add one sample: {"jpg": bytes, "json": bytes} or {"sharp.png": …, "blurry.png": …}."""
        _check_sample(key, members)
        self._waiting.append((key, dict(members)))
        self._waiting_bytes += sum(len(data) + 2 * _BLOCK for data in members.values())
        if self._waiting_bytes >= self.shard_bytes:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            path = self.root / f"{self.prefix}_{len(self.records):05d}.tar"
            self.records.append(write_shard(path, self._waiting))
            self._waiting, self._waiting_bytes = [], 0

    def close(self) -> Path:
        """Write what waits and the index; returns the index's path."""
        self._flush()
        if not self.records:
            raise DataError(f"{self.root}: no sample was written; give the set at least one image")
        return write_index(self.root, self.records, self.info)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
