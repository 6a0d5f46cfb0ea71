"""Steps whose loss or gradients are not finite: no weight moves, the batches are noted, too many end the run."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import torch

from train.log import log
from train.run.step import StepResult

WINDOW = 1000  # steps in which no more than `SCATTERED` times the limit may be bad
SCATTERED = 10
SHOWN = 16  # keys in a message


class DivergedError(ValueError):
    """The loss or the gradients were not finite too often; carries the keys of this rank's batch."""


class BadSteps:
    """Counts bad steps and writes this rank's part of their batches to nonfinite-rankN.jsonl in the run's folder.

    limit: bad steps in a row that end the run; ten times as many among the last 1000 steps end it too.
    """

    def __init__(self, folder: Path, rank: int, limit: int) -> None:
        self.path = folder / f"nonfinite-rank{rank}.jsonl"
        self.limit = limit
        self.in_a_row = 0
        self._recent: deque[int] = deque()

    def check(self, step: int, result: StepResult) -> bool:
        """Whether the step was bad; the same on every rank. DivergedError if it was one too many."""
        if result.finite:
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        self._recent.append(step)
        while self._recent[0] <= step - WINDOW:
            self._recent.popleft()
        self._write(step, result)
        if self.in_a_row >= self.limit:
            self._give_up(f"in {self.in_a_row} steps in a row", step, result)
        if len(self._recent) >= SCATTERED * self.limit:
            self._give_up(f"in {len(self._recent)} of the last {WINDOW} steps", step, result)
        return True

    def _write(self, step: int, result: StepResult) -> None:
        record = {"step": step, "not_finite": result.not_finite, "batches": [facts(batch) for batch in result.batches]}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        log.warning("step %d: not finite: %s; no weight moved; the batch is in %s", step, _named(result), self.path)

    def _give_up(self, how_often: str, step: int, result: StepResult) -> None:
        keys = [key for batch in result.batches for key in batch["key"]]
        raise DivergedError(
            f"loss or gradients were not finite {how_often} (last: step {step}, {_named(result)}): lower optim.lr, or "
            f"look at the batches in {self.path}: {', '.join(keys[:SHOWN])}; start again from a checkpoint before: "
            "--init it, with another run.name"
        )


def facts(batch: dict[str, Any]) -> dict[str, Any]:
    """The same with plain lists."""
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _named(result: StepResult) -> str:
    return ", ".join(result.not_finite) or "loss of another rank"
