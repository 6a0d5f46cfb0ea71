"""The folders below a feature cache's root, looked at from outside: what is there, whether it is sound, deleting it."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.feature_cache.lookup import SegmentReader
from data.feature_cache.segments import locked, remove_segment, stems
from data.feature_cache.spec import META, CacheSpec

_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


def default_root() -> Path:
    """The cache's folder where none is named: of this user, below the system's temporary folder."""
    return Path(tempfile.gettempdir()) / f"sharpprior-features-{os.getuid()}"


@dataclass
class Folder:
    """One folder of the cache; `spec` is None and `problem` says why where meta.json does not describe it.

    `records` counts what a reader would look up, `bytes` all segments and indices, `writers` those at work now.
    """

    path: Path
    spec: CacheSpec | None = None
    problem: str | None = None
    segments: int = 0
    records: int = 0
    bytes: int = 0
    writers: int = 0
    damaged: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A report of a few lines."""
        lines = [
            f"{self.path.name}: {_plural(self.records, 'record', 'records')} in "
            f"{_plural(self.segments, 'segment', 'segments')}, {self.bytes / 2**20:.1f} MiB"
            + (f", {_plural(self.writers, 'writer', 'writers')} at work" if self.writers else "")
        ]
        if self.spec is not None:
            levels = " ".join("×".join(map(str, level)) for level in self.spec.levels)
            crops = json.dumps(self.spec.crops, sort_keys=True)
            lines += [f"  teacher {self.spec.teacher}", f"  {self.spec.dtype}, levels {levels}", f"  crops {crops}"]
        return lines + ([f"  {self.problem}"] if self.problem else [])


def survey(root: str | Path) -> list[Folder]:
    """All folders of the cache below `root`, from their indices alone; [] where there are none."""
    return [_open(path)[0] for path in _folders(Path(root))]


def verify(root: str | Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Folder]:
    """Read every record below `root`; `damaged` of each folder has a line for each problem.

    What a killed writer leaves at the end of its files, records without an entry or a part of one, is no problem.
    """
    opened = [_open(path) for path in _folders(Path(root))]
    done, total = 0, sum(folder.records for folder, _ in opened)
    for folder, reader in opened:
        if folder.problem:
            folder.damaged.append(folder.problem)
        if reader is None:
            continue
        if reader.corrupt:
            folder.damaged.append(f"{folder.path}: {_plural(reader.corrupt, 'index entry', 'index entries')} damaged")
        payload = np.empty(reader.layout.payload_bytes, np.uint8)
        for name, number, sound in reader.every_record(payload):
            if not sound:
                folder.damaged.append(f"{folder.path / name}.seg: record {number} is damaged or cut off")
            done += 1
            progress(done, total)
        reader.close()
    return [folder for folder, _ in opened]


def clear(root: str | Path, only: str | None = None, *, force: bool = False) -> tuple[list[Path], int]:
    """Delete the cache's folders, or the one whose fingerprint starts with `only`; (deleted, bytes).

    Only files of the cache are deleted. Raises DataError where nothing fits, and for a folder that a running writer
    holds, unless `force` (the writer goes on in new files).
    """
    root = Path(root)
    folders = [path for path in _folders(root) if only is None or path.name.startswith(only)]
    if only is not None and len(folders) != 1:
        raise DataError(f"{root}: {len(folders)} folders start with {only!r}; see `sharpprior cache stats`")
    held = [path for path in folders if any(locked(path, stem) for stem in stems(path))]
    if held and not force:
        raise DataError(f"{held[0]}: a running writer holds it; stop the run, or use --force")
    freed = 0
    for path in folders:
        for stem, size in stems(path).items():
            remove_segment(path, stem)
            freed += size
        try:
            for extra in (path / "eviction.lock", path / META, *path.glob(f"{META}.*.tmp")):
                extra.unlink(missing_ok=True)
            path.rmdir()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; delete the folder by hand") from None
    return folders, freed


def _folders(root: Path) -> Iterator[Path]:
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror}); name the folder of a feature cache") from None
    for name in names:
        # By name alone nothing is taken for ours: `clear` deletes.
        if _FINGERPRINT.fullmatch(name) and ((root / name / META).is_file() or stems(root / name)):
            yield root / name


def _open(path: Path) -> tuple[Folder, SegmentReader | None]:
    found = stems(path)
    folder = Folder(path, segments=len(found), bytes=sum(found.values()))
    folder.writers = sum(locked(path, stem) for stem in found)
    try:
        spec = CacheSpec.from_meta(json.loads((path / META).read_bytes()))
        if spec.fingerprint != path.name:
            raise DataError("it describes another folder")
    except (OSError, ValueError) as error:
        folder.problem = f"{path / META}: {error}; no run uses this folder, `sharpprior cache clear` deletes it"
        return folder, None
    folder.spec = spec
    reader = SegmentReader(path, spec.layout)
    reader.refresh()
    folder.records = len(reader)
    return folder, reader


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
