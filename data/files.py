"""Files that are there whole or not at all, whenever their writer is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` for the block to write; it takes the name `path` when the block ends.

    After an error nothing of it is left, and `path` is what it was. durable: on the disk before it takes the name, and
    the name too, so that a machine that loses power has the old file or the new one; without, only a killed writer
    does no harm, which is enough for what the next moment writes again.
    """
    # Of this process alone: a writer that outlives its killed parent for a moment must not share a file with the next.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_atomically(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Write bytes, or text as UTF-8, so that `path` holds the old or all of the new; `durable` as in `replacing`."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def sync(path: Path) -> None:
    """Push a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def own_folder(path: Path, setting: str) -> Path:
    """A folder that this user makes, or made, and nobody else writes into; for places in folders that all users share,
    where another one could have put files for us to believe. PermissionError, naming `setting`, for any other."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise PermissionError(
            errno.EPERM, f"belongs to another user, or others may write into it: remove it, or set {setting}", str(path)
        )
    return path


def files_below(folder: Path) -> Iterator[Path]:
    """Every file of a folder and of those in it, by path, linked folders too, each folder once."""
    seen: set[tuple[int, int]] = set()
    for place, inner, names in os.walk(folder, followlinks=True):
        facts = os.stat(place)
        if (facts.st_dev, facts.st_ino) in seen:
            inner.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        inner.sort()
        yield from (Path(place, name) for name in sorted(names) if Path(place, name).is_file())
