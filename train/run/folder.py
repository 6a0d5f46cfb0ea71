"""The folder of a run: configuration, log, metrics, checkpoints, TensorBoard, report."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from data.files import sync, write_atomically
from train.config.file import dump_config
from train.config.schema import Config
from train.log import log

_MADE_AT_START = {
    ".lock",
    "config.yaml",
    "log.txt",
    "checkpoints",
    "tensorboard",
    "heartbeat",
    "traces",
    "yardsticks.json",
}


class RunFolderError(ValueError):
    """A run folder that cannot be used; the message is one line for the user."""


class RunFolder:
    """Paths inside `root/name`, and what is written there by rank 0.

    path/config.yaml, log.txt, metrics.jsonl, yardsticks.json, checkpoints/, tensorboard/, panel.png, curve.png,
    report.md, report.html
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.log = path / "log.txt"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.yardsticks = path / "yardsticks.json"
        self.panel, self.curve, self.report = (path / name for name in ("panel.png", "curve.png", "report.md"))
        self.page = path / "report.html"

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        """The folder a configuration names."""
        return cls(config.run.folder)

    def claim(self, *, resume: bool) -> None:
        """Create the folder. RunFolderError if it exists without `resume`, or cannot be written."""
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path}: is a file: choose another run.name or run.root")
        if self.started() and not resume:
            raise RunFolderError(
                f"{self.path}: this run exists: go on with it (--resume auto), or start another (--set run.name=…)"
            )
        foreign = self.path.is_dir() and [entry for entry in self.path.iterdir() if not _made_at_start(entry.name)]
        if foreign and not resume:
            raise RunFolderError(f"{self.path}: holds other files: choose another run.name or run.root")
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: cannot write the run's folder: {error.strerror}: choose another with --set run.root=…"
            ) from None

    def started(self) -> bool:
        """Whether something was measured or saved there; a run that failed before that may be started again."""
        return self.metrics.exists() or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))

    def lock(self) -> None:
        """Hold the run's folder as long as this process lives. RunFolderError if another one does."""
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 (closing it would let go)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderError(f"{self.path}: another process is training this run: wait, or stop it") from None

    def write_config(self, config: Config) -> None:
        """The resolved configuration, readable back by `--config`."""
        write_atomically(self.config, dump_config(config))

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl; floats keep all their digits."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RunFolderError(
                f"{self.metrics}: cannot be written ({error.strerror}): free space there, then go on with --resume auto"
            ) from error

    def sync_metrics(self) -> None:
        """Push the records to the disk: a checkpoint that follows counts on them."""
        if self.metrics.exists():
            sync(self.metrics)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Records of metrics.jsonl; lines that are none (torn by a kill, damaged) are left out."""
        if not self.metrics.is_file():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
        return records

    def rewind_metrics(self, step: int, log_every: int) -> None:
        """Drop records after `step`: the resumed run writes those steps again. Warns where some before it are gone."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        there = {record["step"] for record in kept if "loss" in record}
        wanted = [n for n in range(1, step + 1) if n % log_every == 0]
        gone = [n for n in wanted if n not in there]
        if gone:
            log.warning(
                "%s: %d of %d records up to step %d are gone or damaged (the first: step %d); curves will lack them",
                *(self.metrics, len(gone), len(wanted), step, gone[0]),
            )
        write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))


def _made_at_start(name: str) -> bool:
    return name in _MADE_AT_START or name.startswith(("STOP", "stacks-rank-")) or name.endswith(".tmp")
