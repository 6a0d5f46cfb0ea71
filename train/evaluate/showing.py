"""The pictures and the page of an evaluation: worst and best with crops, a panel, and one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from data.errors import DataError
from data.files import replacing, write_atomically
from train.evaluate import telling
from train.evaluate.metrics import as_picture
from train.evaluate.pairs import Item, Pair, PairSet
from train.evaluate.report import draw_panel
from train.evaluate.scores import Score
from train.page.chart import Interval, Series
from train.page.page import Page

CROP = 320  # px a side of what is shown of a picture
SHOWN, ROWS = 3, 6  # pictures of the worst, as many of the best; rows of the panel


class Shown(NamedTuple):
    """The telling part of a picture, all uint8 RGB [H, W, 3] of one size, and its record."""

    record: Mapping[str, Any]
    blurry: np.ndarray
    restored: np.ndarray
    sharp: np.ndarray


def by_gain(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The pictures from the worst gain over the input to the best."""
    metric = results["headline"]["metric"]
    return sorted(results["pictures"], key=lambda each: (each["restored"][metric] - each["input"][metric], each["key"]))


def chosen_to_show(results: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Keys of the worst, of the best (the best first), and of a panel's rows, which are spread over the gains."""
    keys = [each["key"] for each in by_gain(results)]
    few = min(SHOWN, max(1, len(keys) // 2))
    best = keys[::-1][: min(few, len(keys) - few)]
    rows = min(ROWS, len(keys))
    spread = [keys[round(n * (len(keys) - 1) / max(1, rows - 1))] for n in range(rows)]
    return keys[:few], best, list(dict.fromkeys(spread))


def shown_pictures(
    keys: Sequence[str], records: Mapping[str, Mapping[str, Any]], pairs: PairSet, restore: Callable[[Pair], Tensor]
) -> dict[str, Shown]:
    """Those pictures once more, restored again: they are few, and keeping all of a data set is not. One that does not
    read any more is left out."""
    items = {item.key: item for item in pairs.items}
    found = {}
    for key in dict.fromkeys(keys):
        try:
            found[key] = _crop_of(records[key], items[key], pairs, restore)
        except DataError:
            continue
    return found


def _crop_of(record: Mapping[str, Any], item: Item, pairs: PairSet, restore: Callable[[Pair], Tensor]) -> Shown:
    pair = pairs.read(item)
    blurry, sharp, restored = (as_picture(image) for image in (pair.blurry, pair.sharp, restore(pair)))
    top, left = telling_place(blurry, restored, sharp)
    area = np.s_[top : top + CROP, left : left + CROP]
    return Shown(record, *(np.ascontiguousarray(image[area]) for image in (blurry, restored, sharp)))


def telling_place(blurry: np.ndarray, restored: np.ndarray, sharp: np.ndarray, size: int = CROP) -> tuple[int, int]:
    """(top, left) of the window of `size` px in which restoring changed the squared error most, for good or bad."""
    height, width = sharp.shape[:2]
    tall, wide = min(size, height), min(size, width)
    before, after = (np.square(image.astype(np.float32) - sharp).sum(axis=2) for image in (blurry, restored))
    sums = cv2.integral(before - after)
    inside = sums[tall:, wide:] - sums[:-tall, wide:] - sums[tall:, :-wide] + sums[:-tall, :-wide]
    top, left = np.unravel_index(int(np.abs(inside).argmax()), inside.shape)
    return int(top), int(left)


def write_panel(path: Path, shown: Sequence[Shown], metric: str) -> None:
    """panel.png: rows of blurry | restored | sharp of the pictures that have the size of the first."""
    same = [each for each in shown if each.sharp.shape == shown[0].sharp.shape]
    rows = [
        (
            Score(each.record["key"], each.record["tier"], each.record["extent"] or float("nan"), *_psnr(each, metric)),
            *each[1:],
        )
        for each in same
    ]
    with replacing(path, durable=False) as temporary:
        Image.fromarray(draw_panel(rows)).save(temporary, format="PNG")


def _psnr(each: Shown, metric: str) -> tuple[dict[str, float], dict[str, float]]:
    """The headline's metric under the name that a panel reads."""
    return {"psnr": each.record["input"][metric]}, {"psnr": each.record["restored"][metric]}


def write_page(path: Path, results: Mapping[str, Any], shown: Mapping[str, Shown], *, title: str) -> None:
    """report.html: one file to send around."""
    page = Page(title, subtitle=f"sharpprior evaluate, {results['data']['set']}")
    sentence, mood = telling.headline(results)
    page.text(sentence, mood)
    for line in telling.warnings(results):
        page.text(line, "warning")
    page.heading("Gain")
    rows = results["tiers"]
    for name, over in (("over_trivial", "the best trivial"), ("gain", "the blurry input")):
        bounds = ("over_low", "over_high") if name == "over_trivial" else ("low", "high")
        page.intervals(
            [Interval(telling.group(row), row[name], *(_number(row[bound]) for bound in bounds)) for row in rows],
            x="dB, 95 % interval over scenes",
            title=f"Gain over {over}",
        )
    page.table(*telling.gain_table(results))
    page.text(telling.explanation(results), "note")
    _charts(page, results)
    page.heading("All metrics, input → restored")
    page.table(*telling.metric_table(results))
    page.text(telling.notes(results), "note")
    page.heading("What needs no model")
    page.table(*telling.yardstick_table(results))
    told = telling.bound_table(results)
    if told is not None:
        page.heading("What knows the kernel")
        page.table(*told)
        page.text(telling.BOUND, "note")
    measured = telling.similarity_rows(results)
    if measured is not None:
        page.heading("The prior's similarity to the teacher")
        page.table(*measured)
        page.text(telling.SIMILARITY, "note")
    worst, best, _ = chosen_to_show(results)
    for heading, keys in (("Worst pictures", worst), ("Best pictures", best)):
        _sliders(page, heading, [shown[key] for key in keys if key in shown], results)
    page.heading("What was measured")
    page.facts(telling.facts(results))
    if results["failed"]:
        page.heading("Pictures that could not be evaluated")
        page.table(["picture", "why"], [[each["key"], each["why"]] for each in results["failed"]])
    page.write(path)


def _charts(page: Page, results: Mapping[str, Any]) -> None:
    metric, ordered = results["headline"]["metric"], by_gain(results)
    label = results["metrics"][metric]["label"]
    gains = [each["restored"][metric] - each["input"][metric] for each in ordered]
    if len(gains) < 2:
        return
    page.heading("Every picture")
    tiers = list(dict.fromkeys(row["tier"] for row in results["tiers"]))
    synthetic = any(each["extent"] for each in ordered)
    groups = [tier for tier in tiers if any(each["tier"] == tier for each in ordered)] if synthetic else [None]
    series = []
    for tier in groups:
        points = [
            (each["input"][metric], gain)
            for each, gain in zip(ordered, gains, strict=True)
            if tier in (None, each["tier"])
        ]
        series.append(Series(tier or "pictures", *map(list, zip(*points, strict=True)), style="points"))
    page.chart(series, x=f"input {label}, dB", y="gain over the input, dB", title="Gain and input")
    share = [100 * n / (len(gains) - 1) for n in range(len(gains))]
    page.chart(
        [Series("pictures, worst first", share, gains)],
        x="part of the pictures, %",
        y="gain over the input, dB",
        title="Gains in order",
    )


def _sliders(page: Page, heading: str, shown: Sequence[Shown], results: Mapping[str, Any]) -> None:
    if not shown:
        return
    metric = results["headline"]["metric"]
    known = results["metrics"][metric]
    page.heading(heading)
    for each in shown:
        before, after = (each.record[name][metric] for name in ("input", "restored"))
        values = (
            f"{known['label']} {before:.{known['digits']}f} → {after:.{known['digits']}f} dB ({after - before:+.2f})"
        )
        extent = f", blur of {each.record['extent']:.0f} px" if each.record["extent"] else ""
        caption = f"{each.record['key']}: {each.record['tier']}{extent}. Whole picture: {values}"
        page.slider(each.blurry, each.restored, ("blurry", "restored"), caption)
        page.slider(each.restored, each.sharp, ("restored", "sharp"), f"{each.record['key']}: restored beside sharp")


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def write_markdown(path: Path, results: Mapping[str, Any], *, title: str, panel: bool) -> None:
    """report.md."""
    write_atomically(path, telling.markdown(results, title=title, panel=panel), durable=False)
