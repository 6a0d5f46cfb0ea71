"""What is to be restored, and where each result goes: files, trees of folders, patterns, a pipe."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.formats import is_junk
from train.restore.picture import READABLE, PictureError

VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")
OTHER_PICTURES = (".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", "")
WRITTEN_AS = {".bmp": ".png", ".avi": ".mkv", ".webm": ".mkv"}  # kinds that are read and not written
PIPE = Path("-")
SUFFIX = "_restored"
PARTS = ".parts"  # ends the folders, `NAME.FINGERPRINT.parts`, in which pieces of a video wait for the others


class Job(NamedTuple):
    """One file to restore into another; `PIPE` stands for standard input or output."""

    source: Path
    target: Path

    @property
    def is_video(self) -> bool:
        return self.source.suffix.lower() in VIDEOS


@dataclass
class Found:
    """Jobs in their order; what cannot be one, with the reason; files of kinds that are not read, though they are, or
    may be, pictures."""

    jobs: list[Job] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)

    @contextlib.contextmanager
    def failing(self, path: Path) -> Iterator[None]:
        """What the system refuses in the block (a name that is too long, a folder that is closed) is told of `path`."""
        try:
            yield
        except OSError as error:
            self.failed.append((path, f"{error.filename or path}: {error.strerror or error}"))


def find_jobs(names: Sequence[str], out: Path | None, suffix: str | None = None) -> Found:
    """Every picture and video that the names stand for: files, folders with all in them, patterns (`*`, `?`, `[`), and
    `-` for standard input.

    out: a file for one file; else a folder, in which a single folder's tree is kept as it is, and several names keep
    their own; `-` for standard output. None: beside the source (standard output of standard input). suffix: put behind
    each name, before its ending; None: `_restored` beside the source, nothing in another folder. PictureError for what
    makes no sense as a whole; what is wrong with one file is in `failed`.
    """
    sources = [path for name in names for path in _expanded(name)]
    # A pattern means several, however many files it fits.
    single = [str(path) for path in sources] == [str(Path(name).expanduser()) for name in names] and len(sources) == 1
    single = single and not sources[0].is_dir()
    if not single and out is not None and (out == PIPE or out.is_file()):
        raise PictureError(f"{out}: give a folder for a folder, or for several pictures")
    if PIPE in sources and not single:
        raise PictureError("-: standard input is one picture: name nothing beside it")
    found = Found()
    for source in sources:
        if source == PIPE:
            found.jobs.append(Job(PIPE, out or PIPE))
            continue
        with found.failing(source):
            if source.is_dir():
                place = out if out is None or len(sources) == 1 else out / source.resolve().name
                _add_tree(found, source, place, suffix)
            else:
                folder = out if out is not None and (not single or out.is_dir()) else None
                target = out if single and out is not None and folder is None else _beside(source, folder, suffix)
                found.jobs.append(Job(source, target))
    _refuse_clashes(found)
    return found


def _expanded(name: str) -> list[Path]:
    """The paths of a name: itself where it is there, else what fits it as a pattern. PictureError if there is none."""
    path = Path(name).expanduser()
    if name == str(PIPE) or os.path.lexists(path):
        return [path]
    if not glob.has_magic(name):
        raise PictureError(f"{name}: no such file or folder")
    found = [Path(each) for each in sorted(glob.glob(str(path), recursive=True))]
    found = [each for each in found if each.suffix.lower() in (*READABLE, *VIDEOS) and not _is_piece(each)]
    if not found:
        raise PictureError(f"{name}: fits no picture and no video")
    return found


def _beside(source: Path, folder: Path | None, suffix: str | None) -> Path:
    """Where a file's result goes: into the folder, or beside it (None)."""
    suffix = suffix if suffix is not None else (SUFFIX if folder is None else "")
    ending = WRITTEN_AS.get(source.suffix.lower(), source.suffix)
    return (folder or source.parent) / f"{source.stem}{suffix}{ending}"


def _add_tree(found: Found, source: Path, out: Path | None, suffix: str | None) -> None:
    before = len(found.jobs), len(found.failed), len(found.skipped)
    place = source if out is None else out
    if suffix is None and place.resolve() == source.resolve():
        suffix = SUFFIX
    inside = place.resolve() != source.resolve() and place.resolve().is_relative_to(source.resolve())
    for path in _below(source, found):
        name = path.relative_to(source)
        with found.failing(path):
            if is_junk(str(name)) or _is_piece(name) or (inside and path.resolve().is_relative_to(place.resolve())):
                continue
            if path.suffix.lower() not in (*READABLE, *VIDEOS):
                if path.suffix.lower() in OTHER_PICTURES and path.is_file():
                    found.skipped.append(path)
            elif not _is_result(path, suffix):
                found.jobs.append(Job(path, _beside(path, place / name.parent, suffix or "")))
    if before == (len(found.jobs), len(found.failed), len(found.skipped)):
        raise PictureError(f"{source}: no pictures in this folder ({', '.join(READABLE)}; videos {', '.join(VIDEOS)})")


def _below(folder: Path, found: Found) -> Iterator[Path]:
    """Every name in a folder and those in it that is no folder, by path, linked folders too, each folder once. Those
    that cannot be read are in `failed`."""
    seen: set[tuple[int, int]] = set()

    def note(error: OSError) -> None:
        found.failed.append((Path(error.filename), f"{error.filename}: {error.strerror}"))

    for place, inner, names in os.walk(folder, followlinks=True, onerror=note):
        facts = None
        with found.failing(Path(place)):
            facts = os.stat(place)
        if facts is None or (facts.st_dev, facts.st_ino) in seen:
            inner.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        inner.sort()
        yield from (Path(place, name) for name in sorted(names))


def _is_piece(path: Path) -> bool:
    """Whether a file is a piece of a restored video, which `train.restore.video` keeps until it joins them."""
    return any(re.search(rf"\.[0-9a-f]{{12}}{PARTS}$", folder) for folder in path.parts[:-1])


def _is_result(path: Path, suffix: str | None) -> bool:
    """Whether a file is what an earlier call made of the one beside it."""
    stem = path.stem
    if not suffix or not stem.endswith(suffix) or stem == suffix:
        return False
    became = [old for old, new in WRITTEN_AS.items() if new == path.suffix]
    source = path.with_name(stem.removesuffix(suffix))
    if source.suffix.lower() in became and source.exists():  # x.bmp beside x.png: x.bmp_restored.png
        return True
    return any(source.with_name(source.name + ending).exists() for ending in (path.suffix, *became))


def _refuse_clashes(found: Found) -> None:
    """Give x.bmp beside x.png a name of its own; what would fall on a source is no job."""
    sources = {os.path.realpath(job.source) for job in found.jobs}
    taken: set[str] = set()
    jobs, found.jobs = found.jobs, []
    for job in jobs:
        with found.failing(job.source):
            target, problem = _free(job, sources, taken)
            if problem is not None:
                found.failed.append((job.source, problem))
                continue
            taken.add(str(target))
            found.jobs.append(Job(job.source, target))


def _free(job: Job, sources: set[str], taken: set[str]) -> tuple[Path, str | None]:
    """Where a job's result can go, given all sources and the targets that are taken; why it cannot."""
    target = job.target
    if target == PIPE:
        return target, None
    renamed = job.source.suffix.lower() in WRITTEN_AS
    if renamed and (str(target) in taken or os.path.realpath(_namesake(job)) in sources):
        added = target.stem.removeprefix(job.source.stem)
        target = target.with_name(f"{job.source.name}{added}{target.suffix}")
    if str(target) in taken:
        return target, f"{job.source}: another picture is restored into {target} already"
    if os.path.realpath(target) in sources or (target.exists() and _same(target, job.source)):
        return target, f"{target}: is a picture that is to be restored: choose another name"
    return target, None


def _namesake(job: Job) -> Path:
    """The source whose result would have the job's target's name, if it is there."""
    return job.source.with_suffix(job.target.suffix)


def _same(target: Path, source: Path) -> bool:
    try:
        return target.samefile(source)
    except OSError:
        return False
