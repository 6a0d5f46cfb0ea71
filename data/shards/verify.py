"""Prove a shard set against its index, and make the index of a folder of tars that has none."""

import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path

from data.errors import DataError
from data.formats import is_image
from data.image import decode_image, image_size
from data.shards.set import ShardSet
from data.shards.tar import INDEX, KEY, read_tar
from data.shards.write import write_index


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
        known = {shard.name for shard in shards.shards}
        for stray in sorted(shards.root.glob("*.tar*")):
            if stray.name not in known:
                problems.append(f"{stray}: not in the index; remove it, or run `sharpprior index` again")
    return problems


def _index_tar(path: Path) -> dict:
    record = {"name": path.name, "bytes": path.stat().st_size, "sha256": _file_sha256(path)}
    keys, heights, widths, members = [], [], [], {}
    for number, (key, found) in enumerate(read_tar(path)):
        if not KEY.fullmatch(key):
            raise DataError(f"{path}: sample key {key!r}; keys are 0-9, a-z and _: rename the members")
        sizes = {image_size(data, f"{path}: sample {key}.{ext}") for ext, (_, data) in found.items() if is_image(ext)}
        if len(sizes) != 1:
            raise DataError(f"{path}: sample {key}: {len(sizes)} image sizes; give one image, or a pair of one size")
        height, width = sizes.pop()
        keys.append(key)
        heights.append(height)
        widths.append(width)
        for ext, (offset, data) in found.items():
            rows = members.setdefault(ext, [])
            rows.extend([None] * (number - len(rows)))
            rows.append([offset, len(data), zlib.crc32(data)])
    for rows in members.values():
        rows.extend([None] * (len(keys) - len(rows)))
    return {**record, "keys": keys, "heights": heights, "widths": widths, "members": members}


def index_folder(root: str | Path, *, overwrite: bool = False) -> Path:
    """Write `index.json` for a folder of webdataset tars made elsewhere, and return its path.

    It records what the tars hold now: damage that is already there becomes part of the index unless an image's header
    no longer reads. Raises DataError where an index exists (unless `overwrite`), for no tars, and for torn ones.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give a folder of .tar files")
    if (root / INDEX).exists() and not overwrite:
        raise DataError(f"{root / INDEX}: exists; `sharpprior verify` proves it, --overwrite makes it anew")
    tars: Iterable[Path] = sorted(root.glob("*.tar"))
    if not tars:
        raise DataError(f"{root}: no .tar files; make a set with `sharpprior prepare`")
    return write_index(root, [_index_tar(path) for path in tars], {"source": "indexed from existing tars"})
