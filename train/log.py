"""The log of a run, on the console and in its file. Knows nothing of torch, nor of runs."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

log = logging.getLogger("sharpprior")


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
        kept = logging.FileHandler(file, encoding="utf-8")
        kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(kept)
