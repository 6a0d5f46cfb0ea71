"""Lines of output, and a bar while work goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


def say(text: str) -> None:
    """Print one line as it is: no markup, no wrapping, so that paths can be copied."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(title: str, *, transient: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar for the block, moved by calls of (done, total); `transient` bars leave nothing behind."""
    console = Console()
    with Progress(console=console, transient=transient, disable=transient and not console.is_terminal) as bar:
        row = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)
