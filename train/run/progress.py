"""The progress bar: step, loss, steps per second, share of time waiting for data, time left."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from train.log import log
from train.run.step import StepResult

LINE_EVERY_S = 20.0


class TrainingProgress:
    """A bar on a terminal; elsewhere (a file, SLURM) a log line about every 20 s. Use as a context manager."""

    def __init__(self, console: Console, first: int, steps: int) -> None:
        self.steps = steps
        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=steps, completed=first, numbers="")
        self.loss: float | None = None
        self.wait_share = 0.0
        self.rate = 0.0
        self._last_line = time.monotonic()

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, done: int, result: StepResult) -> None:
        """Show a finished step; averages are exponential, over about 20 steps."""
        keep = 0.95 if self.loss is not None else 0.0
        if result.finite:
            self.loss = keep * (self.loss or 0.0) + (1 - keep) * result.loss
        self.wait_share = keep * self.wait_share + (1 - keep) * result.wait_s / result.total_s
        self.rate = keep * self.rate + (1 - keep) / result.total_s
        loss = "…" if self.loss is None else f"{self.loss:.4f}"
        numbers = f"loss {loss}  {self.rate:.2f} it/s  wait {100 * self.wait_share:.0f}%  lr {result.lr:.1e}"
        self.bar.update(self.task, completed=done, numbers=numbers)
        if not self.bar.disable:
            return
        if time.monotonic() - self._last_line >= LINE_EVERY_S or done == self.steps:
            self._last_line = time.monotonic()
            left = (self.steps - done) / self.rate if self.rate else 0.0
            log.info("step %d/%d  %s  %d:%02d left", done, self.steps, numbers, left // 60, left % 60)
