"""Lines of output, and a bar while work goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


def say(text: str) -> None:
    """Print one line as it is: no markup, no wrapping, so that paths can be copied."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def wide_console() -> Console:
    """A console whose tables are not cut at 80 columns where there is no terminal."""
    return Console(width=None if Console().is_terminal else 200)


@contextmanager
def progress(title: str, *, transient: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar for the block, moved by calls of (done, total); `transient` bars leave nothing behind."""
    console = Console()
    with Progress(console=console, transient=transient, disable=transient and not console.is_terminal) as bar:
        row = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


QUIET_S = 10.0  # between lines where there is no terminal


@contextmanager
def told_now_and_then(title: str, *, stderr: bool = False) -> Iterator[Callable[[str], None]]:
    """A line that changes at a terminal; elsewhere, in a job's log, a line every `QUIET_S` seconds."""
    console = Console(stderr=stderr)
    if console.is_terminal:
        with console.status(title) as status:
            yield lambda text: status.update(text)
        return
    last = time.monotonic()

    def tell(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= QUIET_S:
            last = time.monotonic()
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    yield tell


def usable_device(name: str | None):
    """The torch device called `name`, by default a GPU where there is one; ValueError where it cannot be used."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device
