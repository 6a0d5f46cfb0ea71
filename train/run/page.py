"""The page of a run, from its records: gains over what is trivial, losses, the prior, speed, pictures, settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from train.config.file import dump_config
from train.config.schema import Config
from train.evaluate.report import trivial_psnr
from train.evaluate.scores import SEVERE, Score
from train.evaluate.telling import HARM, NAMES
from train.page.chart import Interval, Series
from train.page.page import Page

POINTS = 400  # of a line: more than a screen shows
ABSENT = "–"
Record = Mapping[str, Any]
Pictures = Sequence[tuple[Score, np.ndarray, np.ndarray, np.ndarray]]


class State(NamedTuple):
    """Where a run stands when its page is written: `training` or how it ended, in words; seconds since 1970."""

    step: int
    told: str
    live: bool
    written: float


def run_page(
    config: Config,
    records: Sequence[Record],
    state: State,
    *,
    facts: Mapping[str, str],
    pictures: Pictures = (),
    panel: np.ndarray | None = None,
    every: int = 1,
    renew: int = 15,
) -> Page:
    """The page. records: of metrics.jsonl, of steps every `every`th that is logged. pictures: of the last evaluation;
    panel: shown instead where they are not at hand. renew: seconds after which a browser reads a live page again."""
    left = _left(config, records, state) if state.live else ""
    subtitle = f"{state.told}: step {state.step:,} of {config.train.steps:,}{left}"
    page = Page(
        f"Run {config.run.name}", subtitle=subtitle, refresh=renew if state.live else None, written=state.written
    )
    evaluations = [record for record in records if record.get("tiers")]
    steps = [record for record in records if "loss" in record]
    if evaluations:
        _gains(page, evaluations)
    elif config.eval.every or config.eval.at_start:
        page.text("The gains over the yardsticks stand here after the first evaluation.", "note")
    _losses(page, steps, every)
    _similarity(page, evaluations)
    _pictures(page, pictures, panel)
    _speed(page, steps)
    page.heading("What ran")
    page.facts(facts)
    page.code(dump_config(config), "config.yaml")
    return page


def verdicts(rows: Sequence[Record]) -> list[tuple[str, str]]:
    """(sentence, mood) for the severe tiers (all, where there are none) and for pictures without blur; rows: the tiers
    of an evaluation's record."""
    known = [row for row in rows if row.get("over_trivial") is not None and row["tier"] != "identity"]
    told = []
    for row in [row for row in known if row["tier"] in SEVERE] or known:
        over, low, high = row["over_trivial"], row["over_low"], row["over_high"]
        if low is None or high is None:
            said, mood, interval = "one sample says too little about", "warning", ""
        else:
            interval = f" ({low:+.3f} … {high:+.3f})"
            said, mood = (
                ("better than", "good")
                if low > 0
                else ("WORSE than", "bad")
                if high < 0
                else ("not to be told from", "warning")
            )
        rival = NAMES.get(row["trivial"], row["trivial"])
        told.append((f"{row['tier']}: {said} the best trivial ({rival}), {over:+.3f} dB{interval}.", mood))
    for row in rows:
        if row["tier"] == "identity" and row["gain"] is not None and row["gain"] < HARM:
            told.append(
                (f"Pictures without blur lose {-row['gain']:.2f} dB: it does harm where nothing is to be done.", "bad")
            )
    return told


def _gains(page: Page, evaluations: Sequence[Record]) -> None:
    rows = evaluations[-1]["tiers"]
    page.heading(f"Gain over the best trivial restoration, after step {evaluations[-1]['step']:,}")
    for sentence, mood in verdicts(rows):
        page.text(sentence, mood)
    blurred = [row for row in rows if row["tier"] != "identity" and row.get("over_trivial") is not None]
    if blurred:
        what = "dB over the best trivial"
        page.intervals(
            [Interval(r["tier"], r["over_trivial"], *(_number(r[name]) for name in ("over_low", "over_high")))
             for r in blurred],
            x=f"{what}, with a 95 % interval", title="Now",
        )  # fmt: skip
        page.chart([_over_steps(evaluations, row["tier"]) for row in blurred], x="step", y=what, title="Over the steps")
    yardsticks = list(dict.fromkeys(name for row in rows for name in row.get("yardsticks", {})))
    heads = ["tier", "pairs", "blurry", *(NAMES.get(name, name) for name in yardsticks), "restored", "over blurry"]
    heads += ["best trivial", "over it (95 %)", "SSIM"]
    page.table(heads, [_tier_cells(row, yardsticks) for row in rows], "PSNR in dB, and SSIM")
    page.text(
        "The best trivial restoration of a tier is the best of the blurry picture itself, a Gaussian smoothing and an "
        "unsharp mask, both fitted to that tier on training pairs. A model that does not beat it has learned nothing "
        "of use, even where it gains over the blurry picture. What is not blurred must not get worse.",
        "note",
    )


def _over_steps(evaluations: Sequence[Record], tier: str) -> Series:
    rows = [(record["step"], row) for record in evaluations for row in record["tiers"] if row["tier"] == tier]
    columns = ([row.get(name) for _, row in rows] for name in ("over_trivial", "over_low", "over_high"))
    return Series(tier, [step for step, _ in rows], *columns, style="marked")


def _tier_cells(row: Record, yardsticks: Sequence[str]) -> list[str]:
    others = [row.get("yardsticks", {}).get(name, {}).get("psnr") for name in yardsticks]
    cells = [row["tier"], row["pairs"], *(_told(v, ".2f") for v in (row["input_psnr"], *others, row["restored_psnr"]))]
    low, high = row.get("over_low"), row.get("over_high")
    interval = f" ({low:+.3f} … {high:+.3f})" if low is not None and high is not None else ""
    cells += [
        _told(row["gain"], "+.3f"),
        NAMES.get(row.get("trivial"), ABSENT),
        _told(row.get("over_trivial"), "+.3f") + interval,
    ]
    return [*map(str, cells), " → ".join(_told(row.get(f"{name}_ssim"), ".4f") for name in ("input", "restored"))]


NO_PARTS = {
    *("step", "loss", "lr", "grad_norm", "loss_scale", "shares", "wait_share", "seconds", "cpu_s"),
    *("pairs_per_s", "tflops", "mfu"),
}  # what a step's record says beside the parts of its loss


def _losses(page: Page, steps: Sequence[Record], every: int) -> None:
    page.heading("Losses")
    xs, losses = _column(steps, "loss")
    which = "every logged step" if every == 1 else f"one of {every} logged steps"
    lines = [Series(which, *_envelope(xs, losses), style="faint"), Series("running median", *_median(xs, losses))]
    page.chart(lines, x="step", y="loss", log=bool(losses) and min(losses) > 0)
    names = list(dict.fromkeys(name for record in steps for name in record if name not in NO_PARTS))
    parts = [Series(name, *_median(*_column(steps, name))) for name in names]
    values = [value for part in parts for value in part.y]
    page.chart(parts, x="step", y="parts of the loss, running median", log=bool(values) and min(values) > 0)
    page.chart([Series("learning rate", *_thin(*_column(steps, "lr")))], x="step", y="learning rate")
    xs, norms = _column(steps, "grad_norm")
    lines = [Series(which, *_envelope(xs, norms), style="faint"), Series("running median", *_median(xs, norms))]
    page.chart(lines, x="step", y="norm of the gradient", log=bool(norms) and min(norms) > 0)


def _similarity(page: Page, evaluations: Sequence[Record]) -> None:
    measured = [record for record in evaluations if record.get("similarity")]
    if not measured:
        return
    page.heading("The prior's similarity to the teacher")
    steps = [record["step"] for record in measured]
    kinds = (
        ("similarity", "prior, sees the blurry", "marked"),
        ("student_similarity", "student alone", "marked"),
        ("blurry_similarity", "untouched teacher on the blurry", "dashed"),
    )
    for level in range(len(measured[0]["similarity"])):
        lines = [
            Series(name, steps, [record[key][level] for record in measured], style=style)
            for key, name, style in kinds
            if all(len(record.get(key) or ()) > level for record in measured)
        ]
        page.chart(lines, x="step", y="cosine similarity", title=f"Level {level + 1}, stride {4 * 2**level}")
    page.text(
        "Mean cosine similarity of standardised features to those of the teacher, who sees the sharp picture. It moves "
        "little even where pictures get better: judge by the gains.",
        "note",
    )


def _pictures(page: Page, pictures: Pictures, panel: np.ndarray | None) -> None:
    if not pictures and panel is None:
        return
    page.heading("Validation pictures")
    if not pictures:
        page.pictures([(panel, "of an evaluation before the run went on")])
    for score, blurry, restored, sharp in pictures:
        extent = f", {score.extent:.0f} px of motion" if math.isfinite(score.extent) else ""
        before, after = f"blurry {score.input['psnr']:.2f} dB", f"restored {score.restored['psnr']:.2f} dB"
        trivial = f"best trivial {trivial_psnr(score):.2f} dB"
        page.slider(blurry, restored, (before, after), f"{score.tier}{extent}, {score.key}, {trivial}")
        page.slider(restored, sharp, (after, "sharp"), "and what was to be found")


def _speed(page: Page, steps: Sequence[Record]) -> None:
    page.heading("Speed")
    for name, y, scale in (
        ("pairs_per_s", "pairs a second", 1.0),
        ("wait_share", "waiting for data, % of a step", 100.0),
        ("tflops", "TFLOP/s over all ranks", 1.0),
        ("mfu", "% of the GPUs' peak", 100.0),
    ):
        xs, values = _column(steps, name)
        if values:
            values = [scale * value for value in values]
            lines = [
                Series("steps", *_envelope(xs, values), style="faint"),
                Series("running median", *_median(xs, values)),
            ]
            page.chart(lines, x="step", y=y)
    shared = [record for record in steps if record.get("shares")]
    names = list(dict.fromkeys(name for record in shared for name in record["shares"]))
    xs = [record["step"] for record in shared]
    parts = [Series(n, *_median(xs, [100 * r["shares"].get(n, 0.0) for r in shared])) for n in names]
    if parts:
        page.chart(parts, x="step", y="% of a step, running median", title="Where a step's time goes")


def _left(config: Config, records: Sequence[Record], state: State) -> str:
    seconds = [record["seconds"] for record in records if record.get("seconds") is not None][-50:]
    if not seconds:
        return ""
    left = (config.train.steps - state.step) * float(np.median(seconds))
    told = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min" if left < 7200 else f"{left / 3600:.1f} h"
    return f" · about {told} of steps left"


def _column(records: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    there = [(record["step"], record[name]) for record in records if isinstance(record.get(name), int | float)]
    return [step for step, _ in there], [float(value) for _, value in there]


def _median(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """The running median over a fortieth of the line to either side's half, at `POINTS` places at most."""
    places, half = _places(len(xs)), max(1, len(ys) // 80)
    return [xs[n] for n in places], [median(ys[max(0, n - half) : n + half + 1]) for n in places]


def _thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    places = _places(len(xs))
    return [xs[n] for n in places], [ys[n] for n in places]


def _envelope(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """The line itself where it is short; else the lowest and highest value of each of its pieces, in their order."""
    if len(xs) <= 2 * POINTS:
        return list(xs), list(ys)
    kept: set[int] = {0, len(xs) - 1}
    for piece in np.array_split(np.arange(len(xs)), POINTS):
        values = np.asarray(ys)[piece]
        kept |= {int(piece[values.argmin()]), int(piece[values.argmax()])}
    return [xs[n] for n in sorted(kept)], [ys[n] for n in sorted(kept)]


def _places(count: int) -> list[int]:
    return sorted({round(n) for n in np.linspace(0, count - 1, min(count, POINTS))}) if count else []


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _told(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)
