"""Copies of finished checkpoints elsewhere, made beside the training, through fsspec.

URL/RUN/step-00000500/…   its files; manifest.json is written last: a folder without it is not whole
URL/RUN/metrics.jsonl     as it was at the last copy, as `best`, which names the best checkpoint
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from data.files import write_atomically
from train.checkpoint.folder import Checkpoints
from train.checkpoint.manifest import MANIFEST, STEP, damage, manifest_of
from train.config.schema import Config

log = logging.getLogger("sharpprior")
ATTEMPTS = 5
BACKOFF_S = 1.0  # doubled after each failure
METRICS, BEST = "metrics.jsonl", "best"  # of the run's folder and of its checkpoints', copied along


class FarFolder:
    """The folder of a run's checkpoints behind an fsspec URL. ValueError where the URL itself cannot be used."""

    def __init__(self, url: str, run: str) -> None:
        try:
            # Not from the cache of instances: what another run of this process was told must not be used again.
            self.fs, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
        except ImportError as error:
            raise ValueError(f"checkpoint.copy_to {url}: {error}: install it, or leave the key out") from None
        except (ValueError, OSError) as error:
            raise ValueError(f"checkpoint.copy_to {url}: {str(error).splitlines()[0]}") from None
        self.url = f"{url.rstrip('/')}/{run}"
        self.root = f"{root.rstrip('/')}/{run}"

    def steps(self) -> list[int]:
        """Steps with a folder, whole or not, ascending."""
        try:
            entries = self.fs.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        found = (STEP.match(entry.rstrip("/").rpartition("/")[2]) for entry in entries)
        return sorted(int(match[1]) for match in found if match)

    def folder(self, name: str) -> str:
        """Where a checkpoint is."""
        return f"{self.root}/{name}"

    def manifest(self, name: str) -> dict[str, Any] | None:
        """The manifest of a whole copy, None where it is not whole, empty where it is damaged."""
        try:
            found = json.loads(self.fs.cat_file(f"{self.folder(name)}/{MANIFEST}"))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def put(self, path: Path, place: str) -> None:
        """Copy one file; OSError where its size there is another afterwards."""
        self._make_folder(place)
        self.fs.put_file(str(path), place)
        size = self.fs.info(place)["size"]
        if size != path.stat().st_size:
            raise OSError(f"{place}: {size} bytes arrived of {path.stat().st_size}")

    def _make_folder(self, place: str) -> None:
        # Object stores have no folders and may forbid the question; where one is needed, the copy itself will say so.
        with contextlib.suppress(Exception):
            self.fs.makedirs(place.rpartition("/")[0], exist_ok=True)

    def put_growing(self, path: Path, place: str) -> None:
        """Copy a file that the run writes on: whatever it holds now."""
        self._make_folder(place)
        self.fs.pipe_file(place, path.read_bytes())

    def copy(self, path: Path) -> None:
        """Copy a finished checkpoint, its manifest last; nothing to do where that very one is there already."""
        manifest = manifest_of(path)
        if self.manifest(path.name) == manifest:
            return
        self.remove(path.name)
        for name in manifest:
            self.put(path / name, f"{self.folder(path.name)}/{name}")
        self.put(path / MANIFEST, f"{self.folder(path.name)}/{MANIFEST}")

    def remove(self, name: str) -> None:
        """Remove a copy, its manifest first: half removed is not whole."""
        folder = self.folder(name)
        if self.fs.exists(f"{folder}/{MANIFEST}"):
            self.fs.rm_file(f"{folder}/{MANIFEST}")
        if self.fs.exists(folder):
            self.fs.rm(folder, recursive=True)

    def prune(self, current: int, keep: int, best: str | None) -> None:
        """Keep the `keep` newest up to `current` and the best. Those after it belong to a past that was given up."""
        steps = self.steps()
        kept = set([step for step in steps if step <= current][-keep:])
        for step in steps:
            name = f"step-{step:08d}"
            if step not in kept and name != best:
                self.remove(name)

    def fetch_newest(self, checkpoints: Checkpoints) -> Path | None:
        """Bring the newest whole copy, with the run's metrics and its best one, into its folder; None where there is
        none. ValueError where none arrives whole."""
        problems = []
        for step in reversed(persistently(self.steps)):
            final = checkpoints.path(step)
            manifest = persistently(partial(self.manifest, final.name))
            if manifest is None:
                continue
            problem = self._fetch(final, manifest)
            if problem is None:
                if self.fs.exists(f"{self.root}/{METRICS}"):
                    self.fs.get_file(f"{self.root}/{METRICS}", str(checkpoints.folder.parent / METRICS))
                whole = checkpoints.adopt(_arriving(final))
                self._fetch_best(checkpoints)
                return whole
            log.warning("%s/%s: did not arrive whole: %s", self.url, final.name, problem)
            problems.append(problem)
        if problems:
            raise ValueError(f"{self.url}: no checkpoint arrived whole ({problems[0]})")
        return None

    def newest_file(self, name: str) -> str | None:
        """A small text file of the newest whole copy that has it, None where there is none."""
        for step in reversed(persistently(self.steps)):
            folder = f"step-{step:08d}"
            if name in (persistently(partial(self.manifest, folder)) or {}):
                return persistently(partial(self.fs.cat_file, f"{self.folder(folder)}/{name}")).decode()
        return None

    def _fetch_best(self, checkpoints: Checkpoints) -> None:
        """The best copy and the pointer to it; a run goes on without."""
        try:
            name = self.fs.cat_file(f"{self.root}/{BEST}").decode().strip()
            manifest = self.manifest(name) if STEP.match(name) else None
            final = checkpoints.folder / name
            if manifest is None or not (final.is_dir() or self._fetch(final, manifest) is None):
                return
            if not final.is_dir():
                checkpoints.adopt(_arriving(final))
            write_atomically(checkpoints.folder / BEST, f"{name}\n")
        except FileNotFoundError:
            return
        except Exception as error:  # every file system has its own errors
            log.warning("%s: the best checkpoint was not fetched: %s", self.url, _short(error))

    def _fetch(self, final: Path, manifest: dict[str, Any]) -> str | None:
        """Bring a copy's files beside where they will lie; what is wrong with the copy itself, or None."""
        arriving = _arriving(final)
        shutil.rmtree(arriving, ignore_errors=True)
        problem = None if manifest else f"{MANIFEST} is damaged"
        for name in (*manifest, MANIFEST):
            if not (arriving / name).resolve().is_relative_to(arriving.resolve()):
                problem = f"{MANIFEST} is damaged"
            if problem is not None:
                break
            (arriving / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                persistently(partial(self.fs.get_file, f"{self.folder(final.name)}/{name}", str(arriving / name)))
            except FileNotFoundError:
                problem = f"{name} is missing"
        problem = problem or damage(arriving)
        if problem is not None:
            shutil.rmtree(arriving, ignore_errors=True)
        return problem


def _arriving(final: Path) -> Path:
    return final.with_name(final.name + ".tmp")


def persistently(work: Callable[[], Any], attempts: int = ATTEMPTS, backoff_s: float = BACKOFF_S) -> Any:
    """The result of `work`, tried again after a failure with growing pauses; OSError after the last one."""
    for attempt in range(attempts):
        try:
            return work()
        except FileNotFoundError:
            raise
        except Exception as error:  # every file system has its own errors
            if attempt + 1 == attempts:
                raise OSError(f"checkpoint.copy_to: {_short(error)}") from error
            time.sleep(backoff_s * 2**attempt)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def far_folder(config: Config, *, fresh: bool) -> FarFolder | None:
    """Where a run's checkpoints are copied to, None without `checkpoint.copy_to`. ValueError where a fresh run would
    mix its copies with those of another run of its name."""
    url = config.checkpoint.copy_to
    if url is None:
        return None
    far = FarFolder(url, config.run.name)
    if "file" in far.fs.protocol and Path(far.root).resolve() == config.run.folder.resolve():
        raise ValueError(f"checkpoint.copy_to {url}: is where the run itself lies: choose another place for the copies")
    if fresh and persistently(far.steps):
        raise ValueError(
            f"{far.url}: holds checkpoints of a run of this name: go on with it (--resume auto), or start another "
            "(--set run.name=…)"
        )
    return far
