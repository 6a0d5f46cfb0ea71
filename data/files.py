"""Small files that are there whole or not at all, whenever their writer is killed."""

from __future__ import annotations

import os
from pathlib import Path


# -- writing ----------------------------------------------------------------------------------------------------------
def _temporary(path: Path) -> Path:
    # Of this process alone: a writer that outlives its killed parent for a moment must not share a file with the next.
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds the old bytes or all the new ones, whenever the writer is killed."""
    temporary = _temporary(path)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
