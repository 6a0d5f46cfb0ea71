"""The folders below a feature cache's root, looked at from outside: what is there, whether it is sound, deleting it."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import DataError
from data.feature_cache.spec import META, CacheSpec
from data.feature_cache.store import FILE, LOCK, Store, being_written

_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_FIRST = r"\d{20}-[A-Za-z0-9_.-]+\.(seg|idx|new)|eviction\.lock"  # of the first version: segments of its own
_OWN = re.compile(rf"{META}(\.\d+\.tmp)?|{FILE}(-wal|-shm|-journal)?|{LOCK}|{_FIRST}")


def default_root() -> Path:
    """The cache's folder where none is named: of this user, below the system's temporary folder."""
    return Path(tempfile.gettempdir()) / f"sharpprior-features-{os.getuid()}"


@dataclass
class Folder:
    """One folder of the cache; `spec` is None and `problem` says why where meta.json does not describe it.

    `records` counts what can be looked up, `bytes` all files, `writing` whether a run writes now.
    """

    path: Path
    spec: CacheSpec | None = None
    problem: str | None = None
    records: int = 0
    bytes: int = 0
    writing: bool = False
    damaged: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A report of a few lines."""
        lines = [
            f"{self.path.name}: {self.records} record{'' if self.records == 1 else 's'}, {self.bytes / 2**20:.1f} MiB"
            + (", a run writes to it" if self.writing else "")
        ]
        if self.spec is not None:
            levels = " ".join("×".join(map(str, level)) for level in self.spec.levels)
            crops = json.dumps(self.spec.crops, sort_keys=True)
            lines += [f"  teacher {self.spec.teacher}", f"  {self.spec.dtype}, levels {levels}", f"  crops {crops}"]
        return lines + ([f"  {self.problem}"] if self.problem else [])


def survey(root: str | Path) -> list[Folder]:
    """All folders of the cache below `root`; [] where there are none."""
    return [_open(path)[0] for path in _folders(Path(root))]


def verify(root: str | Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Folder]:
    """Read every record below `root`; `damaged` of each folder has a line for each problem."""
    opened = [_open(path) for path in _folders(Path(root))]
    done, total = 0, sum(folder.records for folder, _ in opened)
    for folder, store in opened:
        if folder.problem:
            folder.damaged.append(folder.problem)
        if store is None:
            continue
        try:
            if (problem := store.problem()) is not None:
                folder.damaged.append(f"{store.path}: {problem}")
            for number, sound in store.every_record():
                if not sound:
                    folder.damaged.append(f"{store.path}: record {number} is damaged")
                done += 1
                progress(done, total)
        except sqlite3.Error as error:
            folder.damaged.append(f"{store.path}: {error}")
        store.close()
    return [folder for folder, _ in opened]


def clear(root: str | Path, only: str | None = None, *, force: bool = False) -> tuple[list[Path], int]:
    """Delete the cache's folders, or the one whose fingerprint starts with `only`; (deleted, bytes).

    Only files of the cache are deleted, those of its first version too. Raises DataError where nothing fits, and for a
    folder that a running writer holds, unless `force` (the writer goes on in a new file).
    """
    root = Path(root)
    folders = [path for path in _folders(root) if only is None or path.name.startswith(only)]
    if only is not None and len(folders) != 1:
        raise DataError(f"{root}: {len(folders)} folders start with {only!r}; see `sharpprior cache stats`")
    held = [path for path in folders if being_written(path)]
    if held and not force:
        raise DataError(f"{held[0]}: a running writer holds it; stop the run, or use --force")
    freed = 0
    for path in folders:
        try:
            for file in _own_files(path):
                freed += file.stat().st_size
                file.unlink(missing_ok=True)
            path.rmdir()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; delete the folder by hand") from None
    return folders, freed


def _own_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _OWN.fullmatch(path.name) and path.is_file()]


def _folders(root: Path) -> Iterator[Path]:
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror}); name the folder of a feature cache") from None
    for name in names:
        # By name alone nothing is taken for ours: `clear` deletes.
        if _FINGERPRINT.fullmatch(name) and (root / name).is_dir() and _own_files(root / name):
            yield root / name


def _open(path: Path) -> tuple[Folder, Store | None]:
    folder = Folder(path, bytes=sum(file.stat().st_size for file in _own_files(path)), writing=being_written(path))
    try:
        folder.spec = CacheSpec.from_meta(json.loads((path / META).read_bytes()))
        if folder.spec.fingerprint != path.name:
            raise DataError("it describes another folder")
    except (OSError, ValueError) as error:
        folder.spec = None
        folder.problem = f"{path / META}: {error}; no run uses this folder, `sharpprior cache clear` deletes it"
        return folder, None
    store = Store(path, folder.spec.fingerprint, folder.spec.payload_bytes)
    try:
        folder.records = len(store)
    except sqlite3.Error as error:
        folder.problem = f"{store.path}: {error}; `sharpprior cache clear` deletes the folder"
        return folder, None
    return folder, store
