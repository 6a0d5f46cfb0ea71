"""What a run writes about itself: metrics.jsonl, TensorBoard, the progress bar, its page, and in the end its report."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from data.files import replacing
from train.config.schema import Config
from train.evaluate.report import draw_curve, draw_panel, draw_similarity, tier_lines, write_report
from train.evaluate.scores import Evaluation
from train.log import log
from train.run.facts import run_notes
from train.run.folder import RunFolder, RunFolderError
from train.run.live import LivePage
from train.run.progress import TrainingProgress
from train.run.rates import Rates
from train.run.schedule import logged
from train.run.shares import StepShares
from train.run.step import StepResult


class Records:
    """The records of a run, on rank 0 alone. `step`: where the run stands when they are opened; facts: names and values
    of what ran, given its records. Use as a context manager: leaving it closes the files and ends the bar."""

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        console: Console,
        step: int,
        shares: StepShares,
        rates: Rates,
        facts: Callable[[Sequence[Mapping]], Mapping[str, str]],
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds, and of rank 0 alone

        self.folder, self.config, self.shares, self.rates = folder, config, shares, rates
        folder.write_config(config)
        self._open = contextlib.ExitStack()
        self._writer = self._open.enter_context(SummaryWriter(str(folder.tensorboard), purge_step=step + 1))
        self._facts, self._page, self._ended = facts, LivePage(folder, config, step, facts), False
        self._bar = TrainingProgress(console, step, config.train.steps)
        self._showing = contextlib.ExitStack()
        self._open.callback(self.end_bar)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._page.close("finished" if self._ended else f"ended by {kind.__name__}" if kind else "stopped")
        self._open.close()

    def begin_bar(self) -> None:
        """Show progress from now on."""
        self._showing.enter_context(self._bar)

    def end_bar(self) -> None:
        """Leave the bar as it stands."""
        self._showing.close()

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Measure a part of a step: `Engine.timed`."""
        with self.shares.timed(part), self.rates.counted(part):
            yield

    def step(self, step: int, result: StepResult) -> None:
        """Show a finished step, and write it down where `train.log_every` says so."""
        self._bar.update(step, result)
        shares = self.shares.take(result.total_s, result.wait_s)
        rates = self.rates.of(result.total_s)
        self.rates.next(step)
        if (parts := self.shares.new_parts()) is not None:
            self._parts(step, *parts)
        if not logged(step, self.config):
            return
        values = {"loss": result.loss, **result.parts, "lr": result.lr, "grad_norm": result.grad_norm}
        values |= {"wait_share": result.wait_s / result.total_s, "seconds": result.total_s, "cpu_s": result.cpu_s}
        values |= rates
        if result.loss_scale is not None:
            values["loss_scale"] = result.loss_scale
        values = finite(values)
        record = {"step": step, **values, **({"shares": shares} if shares else {})}
        self.folder.append_metrics(record)
        self._page.add(record)
        self._scalars("train", {name: value for name, value in values.items() if value is not None}, step)

    def _parts(self, step: int, stage: str, parts: Mapping[str, float]) -> None:
        """What a forward pass consists of, which cannot be seen where it is replayed."""
        if len(parts) > 1:
            record = {"step": step, "stage": stage, "parts": dict(parts)}
            self.folder.append_metrics(record)
            self._page.add(record)
            told = ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
            log.info("forward pass, stage %s: %s", stage, told)

    def evaluation(self, step: int, evaluation: Evaluation, seconds: float) -> None:
        """Write down and say what an evaluation after `step` steps found."""
        record = {"step": step, **finite(evaluation.record())}
        self.folder.append_metrics(record)
        self._page.evaluation(evaluation)
        self._page.add(record)
        rows = evaluation.tiers()
        self._scalars("gain", {row.tier: row.gain for row in rows}, step)
        self._scalars("over_trivial", {row.tier: row.over_trivial for row in rows}, step)
        for name in evaluation.metrics():
            self._scalars(name, {row.tier: row.restored[name] for row in rows}, step)
        self._scalars("similarity", {f"level{n}": value for n, value in enumerate(evaluation.similarity, 1)}, step)
        self._writer.add_image("panel", draw_panel(evaluation.pictures), step, dataformats="HWC")
        gains = "  ".join(f"{row.tier} {row.over_trivial:+.3f}" for row in rows)
        told = "step %d: gain over the best trivial in dB: %s  (%d pairs, %.0f s)"
        log.info(told, step, gains, len(evaluation.scores), seconds)

    def evaluated(self, step: int) -> bool:
        """Whether an evaluation after `step` steps is written down."""
        return any(record["step"] == step and "tiers" in record for record in self.folder.read_metrics())

    def report(self, evaluation: Evaluation) -> None:
        """panel.png, curve.png, similarity.png, report.md; report.html is written once more on leaving."""
        self._ended = True
        from PIL import Image

        records, folder = self.folder.read_metrics(), self.folder
        with replacing(folder.panel, durable=False) as temporary:
            Image.fromarray(draw_panel(evaluation.pictures)).save(temporary, "PNG")
        draw_curve(records, folder.curve)
        draw_similarity(records, folder.path / "similarity.png")
        first = next((record for record in records if record["step"] == 0 and "similarity" in record), {})
        write_report(
            folder.report,
            evaluation,
            title=f"Run {self.config.run.name}",
            facts=self._facts(records),
            before=first.get("similarity", []),
            notes=run_notes(self.config, records),
        )
        for line in tier_lines(evaluation):
            log.info(line)
        log.info("report: %s  page: %s  pictures: %s", folder.report, folder.page, folder.panel)

    def curve(self) -> None:
        """The end of a run without validation: the curve of its losses."""
        self._ended = True
        draw_curve(self.folder.read_metrics(), self.folder.curve)
        log.info("curve: %s (no report: eval is off)", self.folder.curve)

    def _scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        try:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)
        except OSError as error:
            raise RunFolderError(
                f"{self.folder.tensorboard}: cannot be written ({error.strerror}): free space there, then go on with "
                "--resume auto"
            ) from error


def finite(value: Any) -> Any:
    """The same value with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
