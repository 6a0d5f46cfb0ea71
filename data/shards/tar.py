"""The tar files of a set: the names in them, and where their members lie."""

import posixpath
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from data.errors import DataError

INDEX = "index.json"
KEY = re.compile(r"[0-9a-z_]+")  # of the samples that this project writes; others' are read as they are
MAX_KEY = 80  # key + longest extension fit the 100 bytes of a plain (ustar) header
_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Member(NamedTuple):
    """A file in a tar: its whole name, and where its bytes lie."""

    name: str
    offset: int
    size: int


def tar_members(path: Path) -> list[Member]:
    """The files of a tar in their order; a link stands for the file that it names, as `tar` keeps the second name of a
    file. DataError for what is no whole tar, is compressed, or holds what is no file."""
    with open(path, "rb") as file:
        kind = _COMPRESSED.get(file.read(2))
    if kind is not None:
        raise DataError(
            f"{path}: compressed by {kind}: samples are read by their place in the file, so unpack it first"
        )
    try:
        with tarfile.open(path, "r:") as tar:
            entries = [entry for entry in tar if not entry.isdir()]
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: not a whole tar ({error}); restore the shard") from None
    with open(path, "rb") as file:  # tarfile ends in silence at a header that is cut off or damaged
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise DataError(f"{path}: not a whole tar (after {len(entries)} members, at byte {end}); restore the shard")
        while piece := file.read(1 << 20):
            if piece.count(0) != len(piece):
                raise DataError(
                    f"{path}: goes on after its end (tars that were joined?): pack its members into one tar"
                )
    files = {posixpath.normpath(entry.name): entry for entry in entries}
    members = []
    for entry in entries:
        target = entry
        for _ in range(len(entries)):  # a link may name another one
            if target is None or not (target.islnk() or target.issym()):
                break
            base = posixpath.dirname(target.name) if target.issym() else ""
            target = files.get(posixpath.normpath(posixpath.join(base, target.linkname)))
        if target is None or not target.isreg() or target.issparse():
            raise DataError(
                f"{path}: {_printable(entry.name)} is no plain file, nor a link to one in it; pack it again"
            )
        members.append(Member(_printable(entry.name), target.offset_data, target.size))
    return members


def _printable(name: str) -> str:
    """The name as it can be shown and stored, whatever bytes it is made of."""
    name = name.replace("\\", "/")  # as Windows writes paths
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in name)
