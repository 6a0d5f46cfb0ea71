"""Copies of finished checkpoints elsewhere, made beside the training, through fsspec.

URL/RUN/step-00000500/…   its files; manifest.json is written last: a folder without it is not whole
URL/RUN/metrics.jsonl     as it was at the last copy, as `best`, which names the best checkpoint
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from train.checkpoint import MANIFEST, STEP, Checkpoints, damage, manifest_of, write_text
from train.config import Config
from train.run_folder import RunFolder

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
            write_text(checkpoints.folder / BEST, f"{name}\n")
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
    if "file" in far.fs.protocol and Path(far.root).resolve() == RunFolder.of(config).path.resolve():
        raise ValueError(f"checkpoint.copy_to {url}: is where the run itself lies: choose another place for the copies")
    if fresh and persistently(far.steps):
        raise ValueError(
            f"{far.url}: holds checkpoints of a run of this name: go on with it (--resume auto), or start another "
            "(--set run.name=…)"
        )
    return far


class Copier:
    """Copies checkpoints in a thread of its own; training neither waits for it nor fails with it.

    One checkpoint at most waits: a newer one takes its place. A copy that fails is tried again, ATTEMPTS times with
    growing pauses; then one warning says that it is missing, and the next one is tried.
    """

    def __init__(
        self, far: FarFolder, checkpoints: Checkpoints, *, attempts: int = ATTEMPTS, backoff_s: float = BACKOFF_S
    ) -> None:
        self.far, self.checkpoints = far, checkpoints
        self.attempts, self.backoff_s = attempts, backoff_s
        self.missing: list[Path] = []
        checkpoints.held = self.held
        self._waiting: Path | None = None
        self._copying: set[Path] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="checkpoint-copier", daemon=True)
        self._thread.start()

    def submit(self, path: Path) -> None:
        """Copy this finished checkpoint next; returns at once."""
        with self._changed:
            if self._waiting is not None and self._waiting != path:
                log.info("%s is not copied: a newer checkpoint is", self._waiting.name)
            self._waiting = path
            self._changed.notify_all()

    def held(self) -> set[Path]:
        """Checkpoints that must stay on the disk for now."""
        with self._changed:
            return self._copying | ({self._waiting} if self._waiting is not None else set())

    def close(self, timeout_s: float) -> None:
        """Wait until all is copied, at most so long; say what is not."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        left = {path.name for path in self.held()} | {path.name for path in self.missing if path.is_dir()}
        if left:
            log.warning("not copied to %s: %s", self.far.url, ", ".join(sorted(left)))

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None and not self._closing:
                    self._changed.wait()
                if self._waiting is None:
                    return
                path, self._waiting = self._waiting, None
                self._copying = {path}
            try:
                self._copy(path)
            finally:
                with self._changed:
                    self._copying = set()

    def _copy(self, path: Path) -> None:
        started = time.perf_counter()
        problem = self._tried(lambda: self._put_all(path))
        if problem is None:
            self.missing = []
            self._warned = False
            log.info("copied %s to %s (%.1f s)", path.name, self.far.url, time.perf_counter() - started)
            return
        self.missing.append(path)
        if not self._warned:  # once, until it works again
            self._warned = True
            log.warning("%s: not copied to %s: %s; training goes on", path.name, self.far.url, problem)

    def _put_all(self, path: Path) -> None:
        with self._changed:
            best = self.checkpoints.best()
            self._copying = {path} if best is None else {path, best}
        self.far.copy(path)
        if best is not None:  # its own turn to be copied may have gone to a newer one
            self.far.copy(best)
        for growing in (path.parent.parent / METRICS, path.parent / BEST):
            if growing.is_file():
                self.far.put_growing(growing, f"{self.far.root}/{growing.name}")
        step = int(STEP.match(path.name)[1])
        self.far.prune(step, self.checkpoints.keep, best.name if best is not None else None)

    def _tried(self, work: Callable[[], None]) -> str | None:
        """None when it worked, else the last error in one line. Gives up early for a newer checkpoint."""
        for attempt in range(self.attempts):
            try:
                work()
                return None
            except Exception as error:  # every file system has its own errors; none may reach the training
                problem = _short(error)
            if attempt + 1 == self.attempts:
                break
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None, self.backoff_s * 2**attempt)
                if self._waiting is not None:
                    return problem
        return problem
