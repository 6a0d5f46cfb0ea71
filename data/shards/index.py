"""The index of tars that another program made."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import DataError
from data.image import decode_image, image_size
from data.shards.names import BLURRY, Naming, Sample, samples_of
from data.shards.set import ShardSet
from data.shards.tar import INDEX, tar_members
from data.shards.write import write_index

COMPRESSED = ("*.tar.gz", "*.tgz", "*.tar.xz", "*.tar.bz2", "*.tar.zst")


@dataclass
class Indexed:
    """What `index_folder` found: samples, how many of them are recorded pairs, shards; what it left out, and why."""

    path: Path
    samples: int = 0
    pairs: int = 0
    shards: int = 0
    small: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    others: int = 0


@dataclass
class _Read:
    """A tar as it was read: its index record without samples, its samples with their size and crc32s."""

    record: dict
    samples: list[tuple[Sample, tuple[int, int], dict[str, list[int]]]] = field(default_factory=list)
    small: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    others: int = 0


def index_folder(
    root: str | Path,
    *,
    naming: Naming | None = None,
    add: bool = False,
    overwrite: bool = False,
    skip_bad: bool = False,
    min_size: int = 0,
    decode: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Indexed:
    """Write `index.json` for a folder of tars made elsewhere; see `data.shards.names` for what is a sample.

    Keys are the members' paths; one that an earlier shard has is led by its shard's name. add: take in the tars that an
    index does not name yet, and leave what it says of the others. skip_bad: leave out what is no photograph or pair, or
    does not decode (decode=False: whose header does not read), instead of refusing the set; min_size: leave out
    pictures with a smaller side, px. `progress(shards done, all)`.
    Raises DataError where an index exists (unless `add` or `overwrite`), for no tars, torn and compressed ones, and for
    bad samples: a line each.
    """
    root, naming = Path(root), naming or Naming()
    records, info = _before(root, add=add, overwrite=overwrite)
    naming = Naming({**info.get("roles", {}), **naming.roles}, naming.dotted or info.get("dotted", False))
    known = {record["name"] for record in records}
    tars = sorted(path for path in root.iterdir() if path.suffix.lower() == ".tar" and not path.name.startswith("."))
    tars = [path for path in tars if path.name not in known]
    inner = sorted(str(path.relative_to(root)) for path in root.glob("*/*.tar"))
    if inner:
        raise DataError(
            f"{root}: has shards in folders ({inner[0]} …): index each folder, or move them beside each other"
        )
    packed = sorted(path.name for pattern in COMPRESSED for path in root.glob(pattern))
    if packed:
        raise DataError(f"{root}: {', '.join(packed)}: samples are read by their place in a tar, so unpack these first")
    if not tars:
        what = "every .tar file here is in the index already" if add else "no .tar files; make a set with `prepare`"
        raise DataError(f"{root}: {what}")
    workers = min(len(tars), len(os.sched_getaffinity(0)))
    reads = []
    with ThreadPoolExecutor(workers) as pool:
        for read in pool.map(lambda path: _read_tar(path, naming, min_size, decode), tars):
            reads.append(read)
            if progress:
                progress(len(reads), len(tars))
    found = Indexed(root / INDEX, shards=len(records) + len(tars))
    pairs_before = any(ext.startswith(f"{BLURRY}.") for record in records for ext in record["members"])
    if (
        records
        and not pairs_before
        and any(f"{BLURRY}." in ext for r in reads for s in r.samples for ext in s[0].images)
    ):
        raise DataError(f"{root}: its index holds photographs, the new shards hold pairs; keep them in two folders")
    _drop_singles(reads, pairs_before)
    taken = {key for record in records for key in record["keys"]}
    for read in reads:
        records.append(_record(read, taken))
        found.small += read.small
        found.bad += read.bad
        found.others += read.others
    if found.bad and not skip_bad:
        raise DataError(
            f"{root}: {len(found.bad)} samples are no photograph or pair that can be read, {found.bad[0]}; mend them, "
            "or leave them out with --skip-bad",
            details=found.bad,
        )
    found.samples = sum(len(record["keys"]) for record in records)
    found.pairs = found.samples if any(f"{BLURRY}." in ext for r in records for ext in r["members"]) else 0
    if found.samples == 0:
        raise DataError(f"{root}: no pictures in its tars ({len(found.small)} small, {len(found.bad)} bad left out)")
    left_out = {"small": info.get("left_out", {}).get("small", 0) + len(found.small)}
    left_out["bad"] = info.get("left_out", {}).get("bad", []) + found.bad
    facts = {"roles": dict(naming.roles), "dotted": naming.dotted, "left_out": left_out}
    write_index(root, records, {"source": "indexed from tars", **info, **facts})
    return found


def _before(root: Path, *, add: bool, overwrite: bool) -> tuple[list[dict], dict]:
    """The records and the info of an index that is added to."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give a folder of .tar files")
    if not (root / INDEX).exists():
        return [], {}
    if add:
        ShardSet(root).close()  # sound, and each of its shards there
        index = json.loads((root / INDEX).read_bytes())
        return index["shards"], index["info"]
    if not overwrite:
        raise DataError(
            f"{root / INDEX}: exists; `sharpprior verify` proves it, --add takes in the shards that it does not name, "
            "--overwrite makes it anew"
        )
    return [], {}


def _read_tar(path: Path, naming: Naming, min_size: int, decode: bool) -> _Read:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        read = _Read({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
        samples, read.others = samples_of(tar_members(path), naming, path.name)
        for sample in samples:
            if sample.problem:
                read.bad.append(f"{path.name}: {sample.problem}")
                continue
            rows, sizes, problem = {}, {}, ""
            for ext, member in sample.members.items():
                data = os.pread(file.fileno(), member.size, member.offset)
                rows[ext] = [member.offset, member.size, zlib.crc32(data)]
                if ext in sample.images:
                    where = f"{path.name}: {member.name}"
                    try:
                        sizes[member.name] = decode_image(data, where).shape[:2] if decode else image_size(data, where)
                    except DataError as error:
                        problem = problem or str(error)
            if not problem and len(set(sizes.values())) > 1:
                problem = f"{path.name}: {sizes}: pictures of a pair must be of one size"
            size = next(iter(sizes.values()), (0, 0))
            if problem:
                read.bad.append(problem)
            elif min(size) < min_size:
                read.small.append(f"{path.name}: {sample.key}: {size[0]}×{size[1]} px")
            else:
                read.samples.append((sample, size, rows))
    return read


def _drop_singles(reads: Sequence[_Read], pairs_before: bool) -> None:
    """Among pairs, what has no partner is bad: a set holds pairs or photographs, and a run must know which."""
    paired = [
        bool(any(ext.startswith(f"{BLURRY}.") for ext in sample[0].images)) for r in reads for sample in r.samples
    ]
    if not (any(paired) or pairs_before):
        return
    for read in reads:
        for sample, _, _ in read.samples:
            if len(sample.images) < 2:
                name = next(iter(sample.images.values())).name
                read.bad.append(f"{read.record['name']}: {name}: a picture without its partner in a set of pairs")
        read.samples = [sample for sample in read.samples if len(sample[0].images) == 2]


def _record(read: _Read, taken: set[str]) -> dict:
    """The shard's record in the index; keys that are taken are led by its name."""
    keys, members = [], {}
    for number, (sample, _, rows) in enumerate(read.samples):
        key, turn = sample.key, 1
        while key in taken:
            key = f"{read.record['name'].removesuffix('.tar')}/{sample.key}" + (f"~{turn}" if turn > 1 else "")
            turn += 1
        taken.add(key)
        keys.append(key)
        for ext, row in rows.items():
            column = members.setdefault(ext, [])
            column.extend([None] * (number - len(column)))
            column.append(row)
    for column in members.values():
        column.extend([None] * (len(keys) - len(column)))
    heights, widths = ([size[side] for _, size, _ in read.samples] for side in (0, 1))
    return {**read.record, "keys": keys, "heights": heights, "widths": widths, "members": members}
