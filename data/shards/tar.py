"""The tar files of a set: names, keys, and reading the samples in them."""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError

INDEX = "index.json"
KEY = re.compile(r"[0-9a-z_]+")
MAX_KEY = 80  # key + longest extension fit the 100 bytes of a plain (ustar) header
PAIR = ("sharp", "blurry")
_BLOCK = 512


def read_tar(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """(key, {extension: (offset, bytes)}) of a tar; as in webdataset, a sample is consecutive members of one key."""
    key, members = None, {}
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                if not entry.isfile():
                    continue
                stem, _, ext = os.path.basename(entry.name).partition(".")
                if key is not None and stem != key:
                    yield key, members
                    members = {}
                key = stem
                members[ext] = (entry.offset_data, tar.extractfile(entry).read())
    except (tarfile.TarError, EOFError, io.UnsupportedOperation) as error:
        raise DataError(f"{path}: not a whole tar ({error}); restore the shard") from None
    if key is not None:
        yield key, members
