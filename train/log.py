"""The log of a run, on the console and in its file. Knows nothing of torch, nor of runs."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

log = logging.getLogger("sharpprior")


class _File(logging.FileHandler):
    """A run's log.txt; where it cannot be written (a full disk) that is said once, and the console has the lines."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not self._told:
            self._told = True
            print(f"{self.baseFilename}: cannot be written (is the disk full?); its lines are lost", file=sys.stderr)


def start_logging(file: Path | None, console: Console) -> None:
    """Send the program's log to the console and, with a file, to it. Called on rank 0 only."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO)
    if console.is_terminal:
        log.addHandler(RichHandler(console=console, show_path=False, show_level=False, markup=False, highlighter=None))
    else:  # a pipe or a scheduler's file has no width to wrap lines at
        plain = logging.StreamHandler(console.file)
        plain.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%x %X"))
        log.addHandler(plain)
    if file is not None:
        kept = _File(file, encoding="utf-8")
        kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(kept)
