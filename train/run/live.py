"""report.html of a run, written anew while it trains."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.files import replacing
from train.config.schema import Config
from train.evaluate.report import draw_panel
from train.evaluate.scores import Evaluation
from train.log import log
from train.run.folder import RunFolder
from train.run.page import Pictures, State, run_page

EVERY_S, SHARE = 10.0, 0.01  # between two writings, and of the time of training that they may take
MOST = 8000  # records of steps kept for the page


class LivePage:
    """Keeps the page of a run current on rank 0. It is written when something new is told and the last time is long
    enough ago: at least `EVERY_S`, and so seldom that it takes at most `SHARE` of the time.

    step: where the run stands; facts: of what ran, asked at every writing, given the records that are kept.
    """

    def __init__(
        self, folder: RunFolder, config: Config, step: int, facts: Callable[[Sequence[Mapping]], Mapping[str, str]]
    ) -> None:
        self._folder, self._config, self._step, self._facts = folder, config, step, facts
        self._kept = Thinned(folder.read_metrics())
        self._pictures: Pictures = ()
        self._next, self._news, self._told = 0.0, False, False

    def add(self, record: Mapping[str, Any]) -> None:
        """A record as metrics.jsonl has it."""
        self._kept.add(record)
        self._step, self._news = record["step"], True
        if time.monotonic() >= self._next:
            self.write("training", live=True)

    def evaluation(self, evaluation: Evaluation) -> None:
        """The pictures of an evaluation: shown from the next writing on, which is the next record's; and in panel.png,
        for a run that goes on without them."""
        self._pictures, self._next = evaluation.pictures, 0.0
        with self._told_once(self._folder.panel), replacing(self._folder.panel, durable=False) as temporary:
            Image.fromarray(draw_panel(self._pictures)).save(temporary, "PNG")

    def close(self, told: str) -> None:
        """The last writing, where anything was new: `told` is how the run ended."""
        if self._news:
            self.write(told, live=False)

    def write(self, told: str, *, live: bool) -> None:
        """Write the page now. A disk that does not take it is said once, and training goes on."""
        began = time.monotonic()
        records, every = self._kept.records()
        page = run_page(
            self._config, records, State(self._step, told, live, time.time()), facts=self._facts(records),
            pictures=self._pictures, panel=None if self._pictures else self._panel(), every=every,
        )  # fmt: skip
        with self._told_once(self._folder.page):
            page.write(self._folder.page)
        self._next = began + max(EVERY_S, (time.monotonic() - began) / SHARE)

    @contextlib.contextmanager
    def _told_once(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._told:
                self._told = True
                log.warning("%s: cannot be written (%s): training goes on without it", path, error.strerror or error)

    def _panel(self) -> np.ndarray | None:
        """The panel of an earlier evaluation: a run that goes on has no other pictures until its next one. None where
        it cannot be read: a page without it is no reason to stop training."""
        if not self._folder.panel.is_file():
            return None
        try:
            with Image.open(self._folder.panel) as picture:
                return np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError):  # cut short, or not a picture
            return None


class Thinned:
    """Records of evaluations, and of steps at most `MOST`: when there are more, every other one is given up."""

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._steps: list[Mapping[str, Any]] = []
        self._others: list[Mapping[str, Any]] = []
        self._every, self._count = 1, 0
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """A record more, later than those before."""
        if "loss" not in record:
            self._others.append(record)
            return
        if self._count % self._every == 0:
            self._steps.append(record)
        self._count += 1
        if len(self._steps) > MOST:
            self._steps, self._every = self._steps[::2], 2 * self._every

    def records(self) -> tuple[list[Mapping[str, Any]], int]:
        """All that is kept in the order of their steps, and that of logged steps every so many are there."""
        return sorted([*self._others, *self._steps], key=lambda record: record["step"]), self._every
