"""Prove a shard set against its index."""

import hashlib
import zlib
from pathlib import Path

from data.errors import DataError
from data.formats import is_image
from data.image import decode_image
from data.shards.set import NOT_INDEXED, ShardSet


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify_shard(shards: ShardSet, number: int, decode: bool) -> list[str]:
    shard = shards.shards[number]
    path = shards.shard_path(number)
    whole = _file_sha256(path) == shard.sha256
    if whole and not decode:
        return []
    problems = []
    with open(path, "rb") as file:
        for row, key in enumerate(shard.keys):
            for ext, rows in shard.members.items():
                offset, size, crc = (int(value) for value in rows[row])
                if offset < 0:
                    continue
                file.seek(offset)
                data = file.read(size)
                name = f"{path}: sample {key}.{ext}"
                if zlib.crc32(data) != crc:
                    problems.append(f"{name}: damaged (its crc32 is not the index's); restore the shard")
                elif decode and is_image(ext):
                    try:
                        found = decode_image(data, name).shape[:2]
                    except DataError as error:
                        problems.append(str(error))
                        continue
                    if found != (int(shard.heights[row]), int(shard.widths[row])):
                        problems.append(f"{name}: the image is {found}, the index says otherwise; make the index again")
    if not whole and not problems:
        problems.append(f"{path}: damaged between its samples (its sha256 is not the index's); restore the shard")
    return problems


def verify(path: str | Path, *, decode: bool = True, progress=None, cache=None) -> list[str]:
    """Every problem of a set, one line each, nothing raised for damage: missing, torn or stray shards, bytes, pixels.

    `decode=False` stops at the hashes. `progress(done, total)` is called after each shard. Empty for a sound set;
    DataError is raised only where there is no readable index.
    """
    shards = ShardSet(path, cache=cache, check=False)
    found = shards.shard_problems()
    problems = []
    for number, shard in enumerate(shards.shards):
        try:
            problems += [found[number]] if number in found else _verify_shard(shards, number, decode)
        except (DataError, OSError) as error:
            problems.append(f"{shards.location}/{shard.name}: {error}")
        if progress:
            progress(number + 1, len(shards.shards))
    if not shards.remote:
        problems += [f"{shards.root / name}: {NOT_INDEXED}" for name in shards.unindexed()]
    return problems
