"""results.json and pictures.csv: everything that was measured, and of what, for people and for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import write_atomically
from train.evaluate.bins import bin_of
from train.evaluate.book import RESULTS
from train.evaluate.metrics import METRICS
from train.evaluate.summary import ALIGNED, summarise

FORMAT, VERSION = "sharpprior-results", 1
RULES = {
    "psnr"
    + ALIGNED: "RealBlur's protocol: intensity scaled, ECC homography, over the valid pixels; the set's official PSNR",
    "ssim" + ALIGNED: "RealBlur's protocol, after the same alignment; the set's official SSIM",
}


def metric_facts(names: Sequence[str], *, aligned: bool) -> dict[str, dict[str, Any]]:
    """What each metric is called, what it is exactly, which way is better, and its digits.

    With `aligned`, RealBlur's two come first, and what PSNR and SSIM say without alignment is labelled so.
    """
    table = {}
    for name in ("psnr", "ssim") if aligned else ():
        metric = METRICS[name]
        facts = {"label": f"{metric.label} aligned", "note": RULES[name + ALIGNED]}
        table[name + ALIGNED] = facts | {"better": metric.better, "digits": metric.digits}
    for name in names:
        metric = METRICS[name]
        label = f"{metric.label} unaligned" if aligned else metric.label
        table[name] = {"label": label, "note": metric.note, "better": metric.better, "digits": metric.digits}
    return table


def build(
    records: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of results.json. records: of every picture (`Book.records`); facts: model, data, settings, versions.

    A picture without a tier gets the bin of its input PSNR (aligned, where the metrics are).
    ValueError where no picture could be measured.
    """
    headline = next(iter(metrics))
    pictures, failed = [], []
    for record in records.values():
        if "failed" in record:
            failed.append({"key": record["key"], "scene": record["scene"], "why": record["failed"]})
            continue
        picture = {name: value for name, value in record.items() if name not in ("stamp", "content")}
        picture["tier"] = picture["tier"] or bin_of(picture["input"][headline])
        pictures.append(picture)
    if not pictures:
        raise ValueError(f"no picture could be evaluated: {failed[0]['why'] if failed else 'the list is empty'}")
    rows = summarise(pictures, headline)
    return {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        "metrics": dict(metrics),
        "headline": {"tier": rows[-1]["tier"], "metric": headline},
        "tiers": rows,
        "failed": failed,
        "pictures": pictures,
    }


def write_tables(folder: Path, results: Mapping[str, Any]) -> None:
    """pictures.csv: a row a picture, failed ones with the reason."""
    write_atomically(folder / "pictures.csv", as_csv(results), durable=False)


def seal(folder: Path, results: Mapping[str, Any]) -> None:
    """results.json, written after all else: where it stands, the folder is complete."""
    write_atomically(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def as_csv(results: Mapping[str, Any]) -> str:
    """The pictures as a table: columns input_psnr, restored_psnr, gaussian_psnr and so on, unrounded."""
    plain = ("key", "scene", "tier", "extent", "width", "height", "tiles", "seconds")
    yardsticks = list(dict.fromkeys(name for each in results["pictures"] for name in each["yardsticks"]))
    of = ("input", "restored", *yardsticks)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, *(f"{column}_{name}" for column in of for name in results["metrics"]), "failed"])
    for picture in results["pictures"]:
        columns = {"input": picture["input"], "restored": picture["restored"], **picture["yardsticks"]}
        values = [columns.get(column, {}).get(name, "") for column in of for name in results["metrics"]]
        writer.writerow(["" if picture[name] is None else picture[name] for name in plain] + values + [""])
    empty = len(of) * len(results["metrics"])
    for each in results["failed"]:
        writer.writerow([each["key"], each["scene"]] + [""] * (len(plain) - 2 + empty) + [each["why"]])
    return text.getvalue()


def read_results(path: Path) -> dict[str, Any]:
    """A results.json, or that of a folder. ValueError for what is none, or of another version."""
    file = path / RESULTS if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind = (found["format"], found["version"])
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file: `sharpprior evaluate` writes it when all pictures are done") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is no {FORMAT} ({str(error).splitlines()[0]}): evaluate again") from None
    if kind != (FORMAT, VERSION):
        raise ValueError(
            f"{file}: of format {kind[0]} {kind[1]}, this version reads {FORMAT} {VERSION}: evaluate again"
        )
    return found
