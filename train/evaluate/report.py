"""What a run shows: panel.png, curve.png, similarity.png and report.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.evaluate.scores import INPUT, SEVERE, TRIVIAL, Evaluation, Score, TierSummary
from train.evaluate.telling import HARM, NAMES

GAP, LINE, CELL = 8, 18, 210  # px between pictures, of a line of text, and of the narrowest column that holds a caption


def draw_panel(pictures: Sequence[tuple[Score, np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """Rows of blurry | restored | sharp with tier, extent and PSNR above each; uint8 RGB [H, W, 3].

    Every picture is shown pixel for pixel; two lines above it have a column's width, and end in … where it is too
    narrow for them. ValueError on no pictures.
    """
    if not pictures:
        raise ValueError("a panel needs at least one pair of pictures")
    height, width = pictures[0][1].shape[:2]
    column, row_height = max(width, CELL) + GAP, 2 * LINE + height + 2 * GAP
    canvas = Image.new("RGB", (3 * column + GAP, len(pictures) * row_height + GAP), (24, 24, 24))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for row, (score, *images) in enumerate(pictures):
        extent = f", {score.extent:.0f} px" if math.isfinite(score.extent) else ""  # of recorded pairs it is not known
        texts = (
            (f"blurry: {score.tier}{extent}", f"{score.input['psnr']:.2f} dB"),
            ("restored", f"{score.restored['psnr']:.2f} dB (best trivial {trivial_psnr(score):.2f} dB)"),
            ("sharp", score.key),
        )
        for place, (lines, image) in enumerate(zip(texts, images, strict=True)):
            left, top = GAP + place * column, GAP + row * row_height
            for n, (line, ink) in enumerate(zip(lines, ((235, 235, 235), (170, 170, 170)), strict=True)):
                draw.text((left, top + n * LINE), fitted(line, font, column - GAP), fill=ink, font=font)
            canvas.paste(Image.fromarray(image), (left, top + 2 * LINE))
    return np.asarray(canvas)


def trivial_psnr(score: Score) -> float:
    """PSNR of what is best for this pair of all that needs no model: its input, or a trivial yardstick, dB."""
    made = {INPUT: score.input, **score.yardsticks}
    return max(made[name]["psnr"] for name in TRIVIAL if name in made)


def fitted(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """The text, its middle given up for … until it is at most `room` px wide in the font."""
    shown, kept = text, len(text)
    while font.getlength(shown) > room and kept > 2:
        kept -= 1
        shown = f"{text[: (kept + 1) // 2]}…{text[-(kept // 2) :]}"
    return shown


def draw_curve(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss of every logged step (and its running median), and the validation gain over the best trivial per tier,
    over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [(record["step"], record["loss"]) for record in records if "loss" in record]
    evaluations = [record for record in records if "tiers" in record]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    if steps:
        x, y = np.array(steps, np.float64).T
        left.plot(x, y, color="0.8", linewidth=0.8, label="step")
        half = max(1, len(y) // 40)
        smooth = [np.median(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]
        left.plot(x, smooth, color="tab:blue", label="running median")
        left.set(xlabel="step", ylabel="loss", yscale="log" if y.min() > 0 else "linear")
        left.legend(frameon=False)
    for tier in dict.fromkeys(row["tier"] for record in evaluations for row in record["tiers"]):
        if tier == "identity":
            continue  # its gain is a loss of many dB from nearly sharp pictures: the table has it
        rows = [(record["step"], row) for record in evaluations for row in record["tiers"] if row["tier"] == tier]
        # A run begun before there were yardsticks has records without them.
        points = [(step, row["over_trivial"]) for step, row in rows if "over_trivial" in row]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=tier)
    right.axhline(0, color="0.7", linewidth=0.8)
    right.set(xlabel="step", ylabel="gain over the best trivial, dB")
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False)
    figure.savefig(path, dpi=110)


def draw_similarity(records: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """The prior's similarity to the teacher over steps, a picture per level, beside the student's own features and the
    untouched teacher on the blurry image. False, and no file, where nothing was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [record for record in records if record.get("similarity")]
    if not measured:
        return False
    levels = len(measured[0]["similarity"])
    figure = Figure(figsize=(2.9 * levels + 0.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    steps = [record["step"] for record in measured]
    lines = (
        ("similarity", "prior", {"color": "tab:blue", "marker": "o", "markersize": 3}),
        ("student_similarity", "student alone", {"color": "tab:orange", "marker": "s", "markersize": 3}),
        ("blurry_similarity", "teacher on the blurry image", {"color": "0.45", "linestyle": "--"}),
    )
    for level, axes in enumerate(figure.subplots(1, levels, sharex=True, sharey=True, squeeze=False)[0]):
        for name, label, style in lines:
            if all(record.get(name) for record in measured):
                axes.plot(steps, [record[name][level] for record in measured], label=label, **style)
        axes.set(title=f"level {level + 1}, stride {4 * 2**level}", xlabel="step")
        axes.grid(color="0.92")
        if level == 0:
            axes.set_ylabel("cosine similarity to the\nteacher on the sharp image")
            handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)
    return True


def tier_table(evaluation: Evaluation) -> str:
    """The table of a report: a Markdown row per severity tier, the headline in the middle."""
    metrics = evaluation.metrics()
    heads = [f"input {metric.label} | restored {metric.label}" for metric in metrics.values()]
    heads.insert(1, "gain over the best trivial, dB | best trivial | gain over the input, dB")
    lines = [f"| tier | pairs | {' | '.join(heads)} |", "|---|---:|" + "---:|" * (2 * len(metrics) + 3)]
    for row in evaluation.tiers():
        cells = [f"{row.input[n]:.{m.digits}f} | {row.restored[n]:.{m.digits}f}" for n, m in metrics.items()]
        cells.insert(1, f"{_over(row)} | {NAMES[row.trivial]} | {_gain(row)}")
        lines.append(f"| {row.tier} | {row.pairs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tier_lines(evaluation: Evaluation) -> list[str]:
    """The table as plain lines for a terminal."""
    others = {name: metric for name, metric in evaluation.metrics().items() if name != "psnr"}
    lines = []
    for row in evaluation.tiers():
        line = f"{row.tier:9s} {row.pairs:4d} pairs  {row.input['psnr']:6.2f} → {row.restored['psnr']:6.2f} dB  "
        line += f"over the best trivial ({row.trivial}) {_over(row)}  gain over the input {_gain(row)}"
        for name, metric in others.items():
            line += f"  {metric.label} {row.input[name]:.{metric.digits}f} → {row.restored[name]:.{metric.digits}f}"
        lines.append(line)
    return lines


def yardstick_table(evaluation: Evaluation) -> str:
    """What needs no model beside the restored pictures, by every metric: a Markdown row per severity tier."""
    metrics, rows = evaluation.metrics(), evaluation.tiers()
    names = [INPUT, *dict.fromkeys(name for row in rows for name in row.yardsticks)]
    heads = [*(NAMES.get(name, name) for name in names), "restored"]
    labels = " / ".join(metric.label for metric in metrics.values())
    lines = [f"| {labels} | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for row in rows:
        found = {INPUT: row.input, **row.yardsticks, "restored": row.restored}
        cells = [
            " / ".join(f"{found[name][n]:.{m.digits}f}" for n, m in metrics.items()) if name in found else "–"
            for name in (*names, "restored")
        ]
        lines.append(f"| {row.tier} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _over(row: TierSummary) -> str:
    return f"{row.over_trivial:+.3f} ({_interval(row.over_low, row.over_high)})"


def _gain(row: TierSummary) -> str:
    return f"{row.gain:+.3f} ({_interval(row.low, row.high)})"


def _interval(low: float, high: float) -> str:
    return f"{low:+.3f} … {high:+.3f}" if np.isfinite(low) else "one sample: no interval"


def similarity_table(evaluation: Evaluation, before: Sequence[float]) -> str:
    """Mean cosine similarity to the teacher per level: of the prior at the start and now, of the student's own features
    now, and of the teacher's view of the blurry."""
    lines = [
        "| level | stride | prior at the start | prior now | student alone | teacher on the blurry image |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for level, now in enumerate(evaluation.similarity):
        first = f"{before[level]:.3f}" if level < len(before) else "not measured"
        own = f"{evaluation.student_similarity[level]:.3f}" if evaluation.student_similarity else "other channels"
        blurry = evaluation.blurry_similarity[level]
        lines.append(f"| {level + 1} | {4 * 2**level} | {first} | {now:.3f} | {own} | {blurry:.3f} |")
    return "\n".join(lines)


def verdict(evaluation: Evaluation) -> str:
    """One honest sentence per tier group about the gain over what needs no model, and one where sharp pictures lose."""
    rows = {row.tier: row for row in evaluation.tiers()}
    sentences = []
    for tier in SEVERE:
        row = rows.get(tier)
        if row is None or not np.isfinite(row.over_low):
            continue
        if row.over_low > 0:
            said = "is better than the best that needs no model, with an interval above 0"
        elif row.over_high < 0:
            said = "is WORSE than the best that needs no model"
        else:
            said = "cannot be told from the best that needs no model"
        over = f"{row.over_trivial:+.3f} dB over {NAMES[row.trivial]}"
        over += f", {row.gain:+.3f} over {NAMES[INPUT]}" if row.trivial != INPUT else ""
        sentences.append(f"On the {tier} tier the restored picture {said} ({over}).")
    still = rows.get("identity")
    if still is not None and still.gain < HARM:
        sentences.append(f"Pictures that are not blurred LOSE by it: {still.gain:+.3f} dB on the identity tier.")
    return " ".join(sentences)


def write_report(
    path: Path,
    evaluation: Evaluation,
    *,
    title: str,
    facts: Mapping[str, str],
    before: Sequence[float],
    notes: Sequence[str] = (),
    curve: bool = True,
) -> None:
    """report.md beside panel.png and (with `curve`) curve.png. `before`: similarities at the start of the run."""
    tiles = len({score.key for score in evaluation.scores})
    notes_of_metrics = " ".join(f"{metric.label}: {metric.note}." for metric in evaluation.metrics().values())
    lines = [f"# {title}", "", verdict(evaluation), *notes, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", "## Gain over the best trivial", "", tier_table(evaluation), ""]
    lines += [
        "The best trivial of a tier is whichever has the highest mean PSNR there: the blurry input as it is, Gaussian "
        "smoothing, or unsharp masking, both with what is best for the tier on training pairs. "
        f"{notes_of_metrics} The interval is a bootstrap over the {tiles} validation samples: each is drawn "
        "with all its pairs. Samples cut from one photograph resemble each other, so it is narrower than one over "
        "photographs would be.",
        "",
        "## What needs no model",
        "",
        yardstick_table(evaluation),
        "",
        "![blurry, restored, sharp](panel.png)",
        "",
    ]
    if curve:
        lines += ["![loss and gain](curve.png)", ""]
    if evaluation.similarity:
        lines += ["## The prior's similarity to the teacher", "", similarity_table(evaluation, before), ""]
        lines += [
            "Mean cosine similarity of standardised features on the validation pairs: the prior sees the blurry image, "
            "the teacher the sharp one. The last column is what the untouched teacher makes of the blurry image.",
            "",
        ]
        if curve:
            lines += ["![similarity of every level over the steps](similarity.png)", ""]
    path.write_text("\n".join(lines), encoding="utf-8")
