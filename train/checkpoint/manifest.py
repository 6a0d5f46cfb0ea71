"""Size and hash of every file of a checkpoint, and where the run stood."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from data.files import sync, write_atomically

STEP = re.compile(r"^step-(\d+)$")
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or written; the message is one line for the user."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands; all that is needed to go on exactly.

    samples_consumed is the whole state of the training stream: with the seed it says what comes next. config_digest: of
    what decides the losses in config.yaml beside it; cache_fingerprint: of the feature cache, None without one.
    teacher_digest: of the teacher's weights, None without one. versions: of the packages that compute. pairs_version:
    of the rules by which crops and seeds are drawn (`data.stream.crops.PAIRS_VERSION`). origins: of a prior or backbone
    taken over, where it is `from` and the `digest` of its weights as they were taken.
    """

    step: int
    samples_consumed: int
    world: int
    zero: int
    seed: int
    config_digest: str
    index_digest: str
    val_digest: str
    git_commit: str | None
    gain: float | None = None
    cache_fingerprint: str | None = None
    teacher_digest: str | None = None
    versions: dict[str, str] | None = None
    pairs_version: int = 1
    origins: dict[str, dict[str, str]] | None = None


def read_state(path: Path) -> RunState:
    """The state in a checkpoint's run.json. CheckpointError if there is none."""
    try:
        return RunState(**json.loads((path / "run.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of this program ({error})") from None


def read_tensors(file: Path, device: torch.device | str = "cpu") -> dict:
    """What `torch.save` wrote of tensors. CheckpointError for anything else."""
    try:
        found = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # of many types, with advice to load it without a check
        raise CheckpointError(f"{file}: does not read as saved tensors ({type(error).__name__}): damaged") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds no table of tensors: damaged")
    return found


def manifest_of(path: Path) -> dict[str, dict]:
    """Size and hash of every file of a checkpoint, by its name."""
    return json.loads((path / MANIFEST).read_text())


def damage(path: Path, *, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, or None: every file is there with its size and hash. Of `world` ranks
    each looks at its part of them."""
    try:
        manifest = manifest_of(path)
        if not manifest:
            return f"{path}: {MANIFEST} names no files"
        for name, entry in sorted(manifest.items())[rank::world]:
            file = path / name
            if file.stat().st_size != entry["bytes"]:
                return f"{file}: {file.stat().st_size} bytes instead of {entry['bytes']}"
            if digest(file) != entry["blake2b"]:
                return f"{file}: its content changed after it was written"
    except FileNotFoundError as error:
        return f"{path}: {Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path}: {MANIFEST} cannot be read ({error})"
    return None


def entries_of(folder: Path, files: list[Path]) -> dict[str, dict]:
    """What the manifest says of files, pushed to the disk by the rank that wrote them."""
    entries = {}
    for file in files:
        sync(file)
        entries[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "blake2b": digest(file)}
    return entries


def seal(folder: Path, known: dict[str, dict] | None = None) -> None:
    """Write the manifest over all files, but for `known` entries hashed here, and push them to the disk."""
    known = known or {}
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = {str(file.relative_to(folder)): file for file in files}
    missing = sorted(known.keys() - names.keys())
    if missing:
        raise CheckpointError(
            f"{folder}: {missing[0]} of another rank is not there: run.root must be a folder that all nodes share"
        )
    fresh = entries_of(folder, [file for name, file in names.items() if name not in known])
    write_atomically(folder / MANIFEST, json.dumps({name: (known | fresh)[name] for name in names}, indent=1) + "\n")
    for directory in {file.parent for file in files} | {folder}:
        sync(directory)


def digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
