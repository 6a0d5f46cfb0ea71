"""A comparison as people paste it: Markdown, LaTeX, JSON, and a page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.files import write_atomically
from train.evaluate.compare import Comparison, Difference, Row
from train.evaluate.telling import count, markdown_table
from train.page.chart import Interval, Series
from train.page.page import Page

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
SYMBOLS = {
    "×": r"$\times$",
    "σ": r"$\sigma$",
    "²": r"$^2$",
    "≥": r"$\geq$",
    "<": "$<$",
    ">": "$>$",
    "–": "--",
    "≤": r"$\leq$",
}


def title(comparison: Comparison) -> str:
    """`B against A on GOPRO_Large, test`."""
    names = [each.name for each in comparison.loaded]
    data = comparison.loaded[0].results["data"]
    return f"{' and '.join(names[1:])} against {names[0]} on {data['set']}, {data['split']}"


def said(comparison: Comparison) -> list[tuple[str, str]]:
    """(a sentence, good | warning | bad) for every evaluation but the first, on the headline's row and metric."""
    row, metric = comparison.rows[-1], headline_metric(comparison)
    known = comparison.metrics[metric]
    lines = []
    for each, found in zip(comparison.loaded[1:], row.metrics[metric][1:], strict=True):
        sign = -1 if known["better"] == "lower" else 1
        if found.low is None:
            verdict, mood = "one scene: no interval, so nothing is shown", "warning"
        elif min(sign * found.low, sign * found.high) > 0:
            verdict, mood = "better, with an interval that does not hold 0", "good"
        elif max(sign * found.low, sign * found.high) < 0:
            verdict, mood = "WORSE, with an interval that does not hold 0", "bad"
        else:
            verdict, mood = "no difference can be told: the interval holds 0", "warning"
        lines.append(
            (
                f"{each.name}: {known['label']} {change(found, known)} against {comparison.loaded[0].name} on "
                f"{of_row(row)}, better on "
                f"{100 * found.wins:.0f}\u00a0% of them ({verdict}).",
                mood,
            )
        )
    return lines


def headline_metric(comparison: Comparison) -> str:
    """The first metric that all have: PSNR, on RealBlur the aligned one."""
    return next(iter(comparison.metrics))


def markdown(comparison: Comparison) -> str:
    """compare.md."""
    parts = [f"# {title(comparison)}", *(line for line, _ in said(comparison))]
    parts += [f"**{note}**" for note in comparison.notes]
    parts += [f"## Means: {of_row(comparison.rows[-1])}", markdown_table(*means_table(comparison, "**{}**"))]
    parts += [f"## Paired differences: {of_row(comparison.rows[-1])}", markdown_table(*difference_table(comparison))]
    parts += ["## By tier", markdown_table(*tier_table(comparison)), explanation(comparison)]
    return "\n\n".join(parts) + "\n"


def means_table(comparison: Comparison, best: str = "{}") -> tuple[list[str], list[list[str]]]:
    """(heads, rows): means of every metric on the headline's row, of the blurry input and of every evaluation; the best
    of them, which may be the input, through `best`."""
    row = comparison.rows[-1]
    heads = [f"model, {_group(row)}", *(f"{m['label']} {_arrow(m)}" for m in comparison.metrics.values())]
    columns = []
    for name, metric in comparison.metrics.items():
        values = [round(value, metric["digits"]) for value in (row.input[name], *(f.mean for f in row.metrics[name]))]
        top = min(values) if metric["better"] == "lower" else max(values)
        texts = [f"{value:.{metric['digits']}f}" for value in values]
        columns.append([best.format(text) if value == top else text for text, value in zip(texts, values, strict=True)])
    names = ["blurry input", *(each.name for each in comparison.loaded)]
    return heads, [[name, *cells] for name, cells in zip(names, zip(*columns, strict=True), strict=True)]


def difference_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """(heads, rows): paired differences to the first evaluation on the headline's row, a row a metric."""
    row, names = comparison.rows[-1], [each.name for each in comparison.loaded]
    heads = [f"metric, {_group(row)}", *(f"{name} minus {names[0]}" for name in names[1:])]
    rows = [
        [f"{metric['label']} {_arrow(metric)}", *(change(found, metric) for found in row.metrics[name][1:])]
        for name, metric in comparison.metrics.items()
    ]
    return heads, rows


def tier_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """(heads, rows): the headline's metric in every tier."""
    metric = headline_metric(comparison)
    known = comparison.metrics[metric]
    names = [each.name for each in comparison.loaded]
    heads = ["tier", "pictures", *(f"{known['label']} {name}" for name in names)]
    heads += [f"{name} minus {names[0]}" for name in names[1:]]
    rows = []
    for row in comparison.rows:
        found = row.metrics[metric]
        values = [f"{each.mean:.{known['digits']}f}" for each in found]
        rows.append([_group(row), str(row.pictures), *values, *(change(each, known) for each in found[1:])])
    return heads, rows


def explanation(comparison: Comparison) -> str:
    """What differences, intervals and metrics are."""
    notes = " ".join(f"{metric['label']}: {metric['note']}." for metric in comparison.metrics.values())
    return (
        "Differences are means over the same pictures, paired. In brackets: 95 % bootstrap interval over scenes, each "
        f"drawn with all its pictures. {notes}"
    )


def latex(comparison: Comparison) -> str:
    """A table for a paper (package booktabs): means, the best in bold, and the paired difference of the headline's
    metric with its interval. What the numbers are of stands in the caption and in comments."""
    metric, row = headline_metric(comparison), comparison.rows[-1]
    known, data = comparison.metrics[metric], comparison.loaded[0].results["data"]
    heads, rows = means_table(comparison, "\0{}\0")
    marks = {"↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    columns = [escape(head[:-2]) + " " + marks[head[-1]] for head in heads[1:]]
    columns.append(rf"$\Delta${escape(known['label'])} [95\,\% CI]")
    lines = [f"% {line}" for line in (title(comparison), of_row(row), *comparison.notes)]
    lines += [f"% {each.name}: {each.results['model']['digest']}, {each.path}" for each in comparison.loaded]
    lines += [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{l{'c' * len(columns)}}}", r"\toprule"]
    lines += [" & ".join(["Method", *columns]) + r" \\", r"\midrule"]
    for number, cells in enumerate(rows):
        texts = [rf"\textbf{{{cell.strip(chr(0))}}}" if cell.startswith("\0") else escape(cell) for cell in cells]
        found = row.metrics[metric][number - 1] if number > 1 else None
        lines.append(" & ".join([*texts, _interval(found, known) if found else "--"]) + r" \\")
    notes = "; ".join(f"{m['label']}: {m['note']}" for m in comparison.metrics.values())
    caption = (
        f"{data['set']}, {data['split']} ({data['blur variant']}), {of_row(row)}. Difference to "
        f"{comparison.loaded[0].name}: paired, with a bootstrap interval over scenes. {notes}."
    )
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{escape(caption)}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(SPECIAL.get(sign) or SYMBOLS.get(sign, sign) for sign in text)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "format": "sharpprior-comparison",
        "version": 1,
        "evaluations": [
            {"name": each.name, "path": str(each.path), "model": each.results["model"]} for each in comparison.loaded
        ],
        "data": comparison.loaded[0].results["data"],
        "metrics": comparison.metrics,
        "headline": {"tier": comparison.rows[-1].tier, "metric": headline_metric(comparison)},
        "notes": comparison.notes,
        "tiers": [
            {
                "tier": row.tier,
                "pictures": row.pictures,
                "scenes": row.scenes,
                "metrics": {name: [found._asdict() for found in values] for name, values in row.metrics.items()},
            }
            for row in comparison.rows
        ],
    }


def write_page(path: Path, comparison: Comparison) -> None:
    """compare.html."""
    page = Page(title(comparison), subtitle="sharpprior compare")
    for line, mood in said(comparison):
        page.text(line, mood)
    for note in comparison.notes:
        page.text(note, "warning")
    metric, names = headline_metric(comparison), [each.name for each in comparison.loaded]
    label = comparison.metrics[metric]["label"]
    page.heading("Paired differences")
    for number, name in enumerate(names[1:], 1):
        rows = [(_group(row), row.metrics[metric][number]) for row in comparison.rows]
        page.intervals(
            [Interval(tier, found.difference, _number(found.low), _number(found.high)) for tier, found in rows],
            x=f"{label}, 95 % interval over scenes",
            title=f"{name} minus {names[0]}",
            wide=len(names) == 2,
        )
    page.table(*tier_table(comparison))
    row = of_row(comparison.rows[-1])
    page.heading(f"Means of all metrics: {row}")
    page.table(*means_table(comparison))
    page.table(
        *difference_table(comparison), caption=f"Paired differences to {names[0]}: {of_row(comparison.rows[-1])}"
    )
    page.text(explanation(comparison), "note")
    page.heading("Every picture")
    tables = [{p["key"]: p for p in each.results["pictures"]} for each in comparison.loaded]
    keys = [key for key in tables[0] if all(key in table for table in tables)]
    series = [
        Series(
            f"{name} minus {names[0]}",
            [tables[0][key]["restored"][metric] for key in keys],
            [table[key]["restored"][metric] - tables[0][key]["restored"][metric] for key in keys],
            style="points",
        )
        for name, table in zip(names[1:], tables[1:], strict=True)
    ]
    page.chart(
        series, x=f"{label} of {names[0]}", y=f"difference in {label}", title="Difference of every picture", wide=True
    )
    page.heading("What was compared")
    for each in comparison.loaded:
        model = each.results["model"]
        page.facts({"name": each.name, "model": model["path"], "weights": model["digest"], "results": each.path})
    page.code(latex(comparison), "Table for LaTeX")
    page.code(markdown(comparison), "Table for Markdown")
    page.write(path)


def write_text(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    write_atomically(path, text, durable=False)


def change(found: Difference, metric: Mapping[str, Any]) -> str:
    """`+0.123 (+0.050 … +0.196)`, with one digit more than the metric's own."""
    digits = metric["digits"] + 1
    bounds = "one scene: no interval" if found.low is None else f"{found.low:+.{digits}f} … {found.high:+.{digits}f}"
    return f"{found.difference:+.{digits}f} ({bounds})"


def _interval(found: Difference, metric: Mapping[str, Any]) -> str:
    digits = metric["digits"] + 1
    bounds = "" if found.low is None else f" [${found.low:+.{digits}f}$, ${found.high:+.{digits}f}$]"
    return f"${found.difference:+.{digits}f}${bounds}"


def _arrow(metric: Mapping[str, Any]) -> str:
    return "↓" if metric["better"] == "lower" else "↑"


def of_row(row: Row) -> str:
    """Which pictures numbers are of: `severe (13 pictures of 13 scenes)`."""
    return f"{_group(row)} ({count(row.pictures, 'picture')} of {count(row.scenes, 'scene')})"


def _group(row: Row) -> str:
    return "all pictures" if row.tier == "all" else row.tier


def _number(value: float | None) -> float:
    return math.nan if value is None else value
