"""How one source (a photograph, a recorded pair, a video) becomes samples of a shard set."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.image import decode_image, encode_jpeg, encode_png, exif_orientation
from data.prepare.layouts import PairFiles, key_of
from data.prepare.windows import Windows, make_windows, read_frames


@dataclass(frozen=True)
class Recipe:
    """How sources become samples.

    `tile`: largest side of a tile in px (0: images stay whole); a larger image is cut into equal tiles. `keep`: write
    an uncut JPEG or PNG as it is instead of encoding it again. Everything else is written as PNG, tiles of lossy JPEGs
    apart, which become JPEG (4:4:4, `quality`) unless `png`; those of pairs are always PNG. `min_size`: leave out
    images with a smaller side. `sharp_only`: of pairs, keep the sharp images. `windows`: average frames. `shard_bytes`:
    a shard ends once it holds as much.
    """

    tile: int = 768
    keep: bool = True
    png: bool = False
    quality: int = 95
    min_size: int = 0
    sharp_only: bool = False
    windows: Windows | None = None
    shard_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        if self.tile < 0 or self.min_size < 0 or not 1 <= self.quality <= 100 or self.shard_bytes < 1:
            raise DataError(
                f"tile {self.tile} and min_size {self.min_size} (0 or more), quality {self.quality} (1 to 100), "
                f"shard_bytes {self.shard_bytes} (1 or more): out of range"
            )


@dataclass
class JobResult:
    """What a job made: index records of its shards, sources with their hashes, what it left out and why."""

    shards: list[dict] = field(default_factory=list)
    sources: list[list] = field(default_factory=list)
    small: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


def tile_boxes(height: int, width: int, tile: int) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of the fewest equal tiles of at most `tile` px a side that cover the image.

    A side is at least two thirds of `tile` (where the image's is): tiles overlap rather than get too small to crop.
    """
    if tile == 0:
        return [(0, 0, height, width)]
    (tops, tall), (lefts, wide) = _tile_sides(height, tile), _tile_sides(width, tile)
    return [(top, left, tall, wide) for top in tops for left in lefts]


def _tile_sides(side: int, tile: int) -> tuple[list[int], int]:
    """First px of the tiles along a side, and their length."""
    count = -(-side // tile)
    length = max(-(-side // count), min(side, tile * 2 // 3))
    return [i * (side - length) // max(1, count - 1) for i in range(count)], length


def _kept_extension(path: Path, data: bytes) -> str | None:
    """Extension under which a file may be stored as it is, None if it must be encoded again."""
    kind = "jpg" if _is_jpeg(data) else "png" if data[:4] == b"\x89PNG" else None
    return kind if exif_orientation(data) == 1 else None


def _is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def file_samples(source: PairFiles, recipe: Recipe, root: Path, result: JobResult) -> Iterator[tuple[str, dict]]:
    """Samples of a photograph or a recorded pair; what is bad or small is noted in `result`."""
    roles = (("sharp", source.sharp), ("blurry", source.blurry))
    files = [(role, path) for role, path in roles if path is not None and not (recipe.sharp_only and role == "blurry")]
    try:
        raw = {role: path.read_bytes() for role, path in files}
        images = {role: decode_image(raw[role], str(path)) for role, path in files}
    except (DataError, OSError) as error:
        result.bad.append(str(error))
        return
    names = {role: str(path.relative_to(root)) for role, path in files}
    sizes = {role: image.shape[:2] for role, image in images.items()}
    if len(set(sizes.values())) > 1:
        result.bad.append(
            f"{source.blurry}: {sizes['blurry']} px, its sharp partner {sizes['sharp']}; a pair must match"
        )
        return
    height, width = sizes["sharp"]
    if min(height, width) < recipe.min_size:
        result.small.append(names["sharp"])
        return
    result.sources += [[names[role], len(raw[role]), hashlib.sha256(raw[role]).hexdigest()] for role, _ in files]
    boxes = tile_boxes(height, width, recipe.tile)
    for number, (top, left, rows, columns) in enumerate(boxes):
        members = {}
        for role, path in files:
            prefix = f"{role}." if len(files) > 1 else ""
            kept = _kept_extension(path, raw[role]) if recipe.keep and len(boxes) == 1 else None
            tile = images[role][top : top + rows, left : left + columns]
            if kept:
                members[prefix + kept] = raw[role]
            elif recipe.png or len(files) > 1 or len(boxes) == 1 or not _is_jpeg(raw[role]):
                members[prefix + "png"] = encode_png(tile)
            else:
                members["jpg"] = encode_jpeg(tile, recipe.quality)
        facts = {"source": names["sharp"], "box": [top, left, rows, columns]}
        members["json"] = json.dumps(facts, sort_keys=True).encode()
        yield source.key if len(boxes) == 1 else f"{source.key}_{number:02d}", members


def window_samples(source: Path, recipe: Recipe, root: Path, result: JobResult) -> Iterator[tuple[str, dict]]:
    """Samples of a video or a folder of frames: blurry and sharp of every window, cut into tiles."""
    name = str(source.relative_to(root)) if source != root else source.name
    key = key_of(name)
    try:
        frames, seen = read_frames(source), 0

        def counted() -> Iterator[np.ndarray]:
            nonlocal seen
            for seen, frame in enumerate(frames, 1):  # noqa: B007
                yield frame

        for window in make_windows(counted(), recipe.windows):
            if isinstance(window, tuple):
                result.refused.append(f"{name}: frames {window[0]} to {window[0] + window[1] - 1}")
                continue
            height, width = window.sharp.shape[:2]
            if min(height, width) < recipe.min_size:
                result.small.append(name)
                return
            for number, (top, left, rows, columns) in enumerate(tile_boxes(height, width, recipe.tile)):
                area = slice(top, top + rows), slice(left, left + columns)
                facts = {"source": name, "box": [top, left, rows, columns], "extent_px": round(window.extent, 2)}
                facts |= {"first_frame": window.first, "level": window.level, "subframes": window.subframes}
                members = {f"{role}.png": encode_png(getattr(window, role)[area]) for role in ("sharp", "blurry")}
                members["json"] = json.dumps(facts, sort_keys=True).encode()
                yield f"{key}_{window.level:02d}_{window.first:06d}_{number:02d}", members
        if seen < (least := min(recipe.windows.levels)):
            result.refused.append(f"{name}: {seen} frames; the shortest window has {least}")
        result.sources.append([name, *_size_and_hash(source)])
    except (DataError, OSError) as error:
        result.bad.append(str(error))


def _size_and_hash(source: Path) -> tuple[int, str]:
    files = sorted(p for p in source.iterdir() if p.is_file()) if source.is_dir() else [source]
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return sum(path.stat().st_size for path in files), digest.hexdigest()
