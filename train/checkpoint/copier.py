"""Copies checkpoints elsewhere in a thread beside the training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from train.checkpoint.far import ATTEMPTS, BACKOFF_S, BEST, METRICS, FarFolder, _short, log
from train.checkpoint.folder import Checkpoints
from train.checkpoint.manifest import STEP


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
