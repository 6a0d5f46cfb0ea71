"""The folder of a run: configuration, log, metrics, checkpoints, TensorBoard, report."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from train import ROOT
from train.checkpoint import write_text
from train.config import Config
from train.config_file import dump_config

log = logging.getLogger("sharpprior")


class RunFolderError(ValueError):
    """A run folder that cannot be used; the message is one line for the user."""


class RunFolder:
    """Paths inside `root/name`, and what is written there by rank 0.

    path/config.yaml, log.txt, metrics.jsonl, checkpoints/, tensorboard/, panel.png, curve.png, report.md
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.log = path / "log.txt"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        """The folder a configuration names."""
        return cls(Path(config.run.root).expanduser() / config.run.name)

    def claim(self, *, resume: bool) -> None:
        """Create the folder. RunFolderError if it exists without `resume`, or cannot be written."""
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path}: is a file: choose another run.name or run.root")
        if self.path.is_dir() and any(self.path.iterdir()) and not resume:
            raise RunFolderError(
                f"{self.path}: this run exists: go on with it (--resume auto), or start another (--set run.name=…)"
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: cannot write the run's folder: {error.strerror}: choose another with --set run.root=…"
            ) from None

    def write_config(self, config: Config) -> None:
        """The resolved configuration, readable back by `--config`."""
        write_text(self.config, dump_config(config))

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl; floats keep all their digits."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Records of metrics.jsonl; a last line torn by a kill is left out."""
        if not self.metrics.is_file():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        return records

    def rewind_metrics(self, step: int) -> None:
        """Drop records after `step`: the resumed run writes those steps again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))


def start_logging(folder: RunFolder | None, console: Console) -> None:
    """Send the program's log to the console and, with a folder, to its log.txt. Called on rank 0 only."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO)
    shown = RichHandler(console=console, show_path=False, show_level=False, markup=False, highlighter=None)
    log.addHandler(shown)
    if folder is not None:
        kept = logging.FileHandler(folder.log, encoding="utf-8")
        kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(kept)


def config_digest(config: Config) -> str:
    """Hash of everything that decides the losses of a run: not its name, its length, or what is written when."""
    facts = config.model_dump(mode="json", exclude={"run": {"name", "root"}, "checkpoint": True, "eval": True})
    for key in ("log_every",):
        del facts["train"][key]
    facts["data"]["weights"] = [source["weight"] for source in facts["data"]["train"] or [{"weight": 1.0}]]
    for key in ("workers", "train", "val", "cache"):  # the index's digest stands for the data itself
        del facts["data"][key]
    for key in ("cpu_threads", "timeout_minutes"):
        del facts["engine"][key]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def git_commit() -> str | None:
    """Commit of the checkout, with `+` if files differ from it; None outside git."""
    try:
        run = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")
