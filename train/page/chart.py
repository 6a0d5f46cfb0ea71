"""Charts as SVG and HTML: the lines stretch with the screen, the letters do not."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Literal, NamedTuple

COLOURS = 9  # of page.css: --c0 …, the last one grey
SIDE = 1000  # units of the drawing, stretched to whatever the screen has


class Series(NamedTuple):
    """A line of a chart: y over x, of equal length; a y that is None or not finite is a gap.

    low, high: bounds of a band around the line. style: `line`; `marked`, a line with dots; `points`, dots alone;
    `faint`, a thin grey line that others stand out from; `dashed`, a yardstick.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    style: Literal["line", "marked", "points", "faint", "dashed"] = "line"


class Interval(NamedTuple):
    """A value with its interval; low and high are NaN where there is none."""

    name: str
    value: float
    low: float = math.nan
    high: float = math.nan


def draw_chart(
    series: Sequence[Series], *, x: str, y: str, title: str = "", log: bool = False, wide: bool = False
) -> str:
    """A <figure> of the series, with a legend where they are several; `log`: y in decades.

    ValueError for lengths that differ, and for a value that is not positive on a logarithmic axis.
    """
    for each in series:
        lengths = {len(values) for values in (each.x, each.y, each.low, each.high) if values is not None}
        if len(lengths) > 1:
            raise ValueError(f"{each.name}: x, y and bounds have {sorted(lengths)} values: expected as many")
    columns = [column for each in series for column in (each.y, each.low, each.high) if column is not None]
    ys = [value for column in columns for value in column if _there(value)]
    xs = [value for each in series for value, at in zip(each.x, each.y, strict=True) if _there(at) and _there(value)]
    heading = f"<figcaption>{escape(title or y)}</figcaption>"
    frame = f'<figure class="chart{" wide" if wide else ""}">{heading}'
    if not xs:
        return f'{frame}<p class="empty">nothing measured yet</p></figure>'
    if log and min(ys) <= 0:
        raise ValueError(f"{y}: {min(ys)} has no place on a logarithmic axis")
    across, up = Axis.of(xs, tight=True), Axis.of(ys, log=log)
    colours = _colours(series)
    drawn = "".join(
        _draw(each, across, up, colour)
        for each, colour in sorted(zip(series, colours, strict=True), key=lambda pair: pair[0].style != "faint")
    )
    data = {
        "x": [across.low, across.high],
        "y": [up.low, up.high],
        "log": log,
        "unit": x,
        "series": [
            {"name": each.name, "c": colour, "x": [_short(v) for v in each.x], "y": [_short(v) for v in each.y]}
            | ({"low": [_short(v) for v in each.low], "high": [_short(v) for v in each.high]} if _banded(each) else {})
            for each, colour in zip(series, colours, strict=True)
        ],
    }
    keys = "".join(
        f'<li class="{each.style}" style="--c:var(--c{colour})">{escape(each.name)}</li>'
        for each, colour in zip(series, colours, strict=True)
    )
    legend = f'<ul class="legend">{keys}</ul>' if len(series) > 1 else ""
    return (
        f'{frame}{legend}<div class="plot" tabindex="0" role="img" aria-label="{escape(f"{y} over {x}")}" '
        f'data-chart="{escape(json.dumps(data, separators=(",", ":"), allow_nan=False))}">'
        f'{up.labels("y")}{across.labels("x")}<div class="area"><svg viewBox="0 0 {SIDE} {SIDE}" '
        f'preserveAspectRatio="none" aria-hidden="true">{up.grid("y")}{drawn}</svg></div></div>'
        f'<p class="axis">{escape(f"{y} over {x}" if title else f"over {x}")}</p></figure>'
    )


def draw_intervals(rows: Sequence[Interval], *, x: str, title: str = "", wide: bool = False) -> str:
    """A <figure> with a row for every interval; ValueError for a value that is not finite."""
    for row in rows:
        if not math.isfinite(row.value):
            raise ValueError(f"{row.name}: {row.value} has no place on an axis")
    frame = f'<figure class="chart intervals{" wide" if wide else ""}"><figcaption>{escape(title or x)}</figcaption>'
    if not rows:
        return f'{frame}<p class="empty">nothing measured yet</p></figure>'
    axis = Axis.of([0.0, *(value for row in rows for value in row[1:] if math.isfinite(value))])
    lines = []
    for row in rows:
        known = math.isfinite(row.low) and math.isfinite(row.high)
        told = f"{row.value:+.3f}" + (f" ({row.low:+.3f} … {row.high:+.3f})" if known else "")
        low, high = (row.low, row.high) if known else (row.value, row.value)
        sign = "up" if known and low > 0 else "down" if known and high < 0 else "open"
        left, right, at = (100 * axis.place(value) for value in (low, high, row.value))
        lines.append(
            f'<div class="row {sign}"><span class="name">{escape(row.name)}</span><span class="track">'
            f'<i class="zero" style="left:{100 * axis.place(0):.2f}%"></i>'
            f'<i class="range" style="left:{left:.2f}%;width:{right - left:.2f}%"></i>'
            f'<i class="dot" style="left:{at:.2f}%"></i></span><span class="value">{escape(told)}</span></div>'
        )
    scale = f'<div class="row scale"><span></span><span class="track">{axis.labels("x")}</span><span></span></div>'
    return f'{frame}{"".join(lines)}{scale}<p class="axis">{escape(x)}</p></figure>'


class Axis(NamedTuple):
    """An axis from `low` to `high` with its ticks, linear or in decades."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    @classmethod
    def of(cls, values: Sequence[float], *, log: bool = False, tight: bool = False) -> Axis:
        """The axis that holds `values`, with a little room unless it is `tight`."""
        low, high = (f(map(float, values)) for f in (min, max))
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
        elif not tight:
            low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
        if log:
            return cls(10**low, 10**high, _decades(10**low, 10**high), True)
        return cls(low, high, _steps(low, high, whole=tight and all(float(value).is_integer() for value in values)))

    def place(self, value: float) -> float:
        """Where a value stands: 0 at the low end, 1 at the high one."""
        low, high, at = (math.log10(v) for v in (self.low, self.high, value)) if self.log else (*self[:2], value)
        return (at - low) / (high - low)

    def labels(self, way: Literal["x", "y"]) -> str:
        side = "left" if way == "x" else "bottom"
        texts = _texts(self.ticks)
        spans = (
            f'<span style="{side}:{100 * self.place(tick):.2f}%">{text}</span>'
            for tick, text in zip(self.ticks, texts, strict=True)
        )
        return f'<div class="ticks {way}" aria-hidden="true">{"".join(spans)}</div>'

    def grid(self, way: Literal["x", "y"]) -> str:
        lines = []
        for tick in self.ticks:
            at = SIDE * self.place(tick)
            path = f"M0 {SIDE - at:.1f}H{SIDE}" if way == "y" else f"M{at:.1f} 0V{SIDE}"
            lines.append(f'<path class="{"zero" if tick == 0 else "grid"}" d="{path}"/>')
        return "".join(lines)


def _steps(low: float, high: float, wanted: int = 5, *, whole: bool = False) -> tuple[float, ...]:
    """Round numbers from low to high, about `wanted` of them; whole ones where they count something."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    step = math.ceil(step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(n * step, 12) for n in range(first, last + 1))


def _decades(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten; 2 and 5 times them too where there are few; plain steps inside one decade."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    many = len(powers) > 5
    ticks = [f * 10.0**p for p in powers for f in ((1,) if many else (1, 2, 5)) if low <= f * 10.0**p <= high]
    ticks = ticks[:: math.ceil(len(ticks) / 7)] if ticks else []
    return tuple(ticks) if len(ticks) > 2 else tuple(tick for tick in _steps(low, high) if tick > 0)


def _texts(ticks: Sequence[float]) -> list[str]:
    """Labels of ticks, all with the digits that tell neighbours apart."""
    if any(value and not 1e-3 <= abs(value) < 1e6 for value in ticks):
        return [f"{value:.3g}" for value in ticks]
    digits = max((len(f"{value:.6f}".rstrip("0").partition(".")[2]) for value in ticks), default=0)
    return [f"{value:,.{digits}f}" for value in ticks]


def _draw(series: Series, across: Axis, up: Axis, colour: int) -> str:
    def at(x: float, y: float) -> str:
        return f"{SIDE * across.place(x):.1f} {SIDE - SIDE * up.place(y):.1f}"

    runs: list[list[int]] = [[]]
    for n, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        if _there(x) and _there(y):
            runs[-1].append(n)
        elif runs[-1]:
            runs.append([])
    parts = []
    points = [n for run in runs for n in run]
    if _banded(series):
        known = [n for n in points if _there(series.low[n]) and _there(series.high[n])]
        edge = [at(series.x[n], series.high[n]) for n in known] + [at(series.x[n], series.low[n]) for n in known[::-1]]
        if edge:
            parts.append(f'<path class="band" d="M{"L".join(edge)}Z"/>')
    if series.style != "points":
        lines = "".join(f"M{'L'.join(at(series.x[n], series.y[n]) for n in run)}" for run in runs if run)
        parts.append(f'<path class="{series.style}" d="{lines}"/>')
    lonely = [run[0] for run in runs if len(run) == 1 and series.style != "faint"]
    dots = points if series.style in ("points", "marked") else lonely
    if dots:  # a line without length has a round end, which no stretching makes an oval
        spots = "".join(f"M{at(series.x[n], series.y[n])}h0" for n in dots)
        parts.append(f'<path class="dots" d="{spots}"/>')
    return f'<g style="--c:var(--c{colour})">{"".join(parts)}</g>'


def _colours(series: Sequence[Series]) -> list[int]:
    """A colour of its own for every series; the faint ones are grey, the last of the colours."""
    numbers, used = [], 0
    for each in series:
        numbers.append(used % (COLOURS - 1) if each.style != "faint" else COLOURS - 1)
        used += each.style != "faint"
    return numbers


def _banded(series: Series) -> bool:
    return series.low is not None and series.high is not None


def _there(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _short(value: float | None) -> float | None:
    """Six digits, which is more than a pointer can tell."""
    return float(f"{value:.6g}") if _there(value) else None
