"""Restore picture files: one, or every one of a folder and of those in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from data.files import files_below
from data.formats import is_junk
from train.restore.picture import READABLE, Picture, PictureError, check_target, read_picture, write_picture
from train.restore.tiles import restore_image

OTHER_PICTURES = (".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", "")


@dataclass
class Done:
    """What became of the pictures: restored and already there (counts), failed (a line each), and files that are
    skipped because they are, or may be, pictures of a kind that is not read."""

    restored: int = 0
    there: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)


def restore_file(
    network: torch.nn.Module,
    source: Path,
    target: Path,
    *,
    tile: int | None,
    overwrite: bool,
    on_tile: Callable[[int, int], None] = lambda done, all_: None,
) -> Picture:
    """Restore one photograph file into another. PictureError names the file."""
    check_target(target, overwrite=overwrite)
    picture = read_picture(source)
    image = torch.from_numpy(np.ascontiguousarray(picture.rgb.transpose(2, 0, 1)))
    restored = restore_image(network, image, tile, on_tile)
    result = replace(picture, rgb=restored.permute(1, 2, 0).numpy())
    target.parent.mkdir(parents=True, exist_ok=True)
    write_picture(target, result, overwrite=overwrite)
    return result


def restore_all(
    network: torch.nn.Module,
    source: Path,
    target: Path,
    *,
    tile: int | None,
    overwrite: bool,
    skip_existing: bool = False,
    on_file: Callable[[Path, str | None], None] = lambda path, problem: None,
    on_tile: Callable[[Path, int, int], None] = lambda path, done, all_: None,
) -> Done:
    """Restore a file, or the pictures of a folder and of those in it into the folder `target`, the tree kept.

    skip_existing: a picture whose restored file is there is left as it is. `on_file(path, problem)` is told of each,
    `on_tile(path, tiles done, all)` of large ones. A picture that cannot be read does not stop the others.
    """
    done = Done()
    if source.is_dir():
        jobs = list(_jobs_of(source, target, done))
        if not jobs:
            raise PictureError(f"{source}: no pictures in this folder ({', '.join(READABLE)})")
        if target.is_file():
            raise PictureError(f"{target}: is a file: give a folder for a folder")
        if target.resolve() == source.resolve():
            raise PictureError(
                f"{target}: is the folder of the pictures themselves: choose another for the restored ones"
            )
    else:
        jobs = [(source, target / _writable_name(source) if target.is_dir() else target)]
    for path, destination in jobs:
        if skip_existing and destination.exists():
            done.there += 1
            continue

        def told(tiles: int, every: int, path: Path = path) -> None:
            on_tile(path, tiles, every)

        try:
            restore_file(network, path, destination, tile=tile, overwrite=overwrite, on_tile=told)
            done.restored += 1
            on_file(path, None)
        except PictureError as error:
            done.failed.append(str(error))
            on_file(path, str(error))
    return done


def _jobs_of(source: Path, target: Path, done: Done) -> Iterator[tuple[Path, Path]]:
    """(picture, where it goes) of a folder's tree; what was restored into it before is left out."""
    taken: set[Path] = set()
    inside = target.resolve().is_relative_to(source.resolve()) and target.resolve() != source.resolve()
    for path in files_below(source):
        name = path.relative_to(source)
        if is_junk(str(name)) or (inside and path.resolve().is_relative_to(target.resolve())):
            continue
        if path.suffix.lower() not in READABLE:
            if path.suffix.lower() in OTHER_PICTURES:
                done.skipped.append(path)
            continue
        destination = target / name.with_name(_writable_name(path))
        if destination in taken or (
            destination.name != path.name and (source / name.with_name(destination.name)).exists()
        ):
            destination = destination.with_name(f"{path.name}.png")  # x.bmp beside x.png
        taken.add(destination)
        yield path, destination


def _writable_name(path: Path) -> str:
    return path.name if path.suffix.lower() != ".bmp" else f"{path.stem}.png"
