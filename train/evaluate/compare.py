"""Two or more evaluations of the same pictures: paired differences, with intervals over scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.config.identity import differences
from train.evaluate.book import RESULTS
from train.evaluate.results import read_results
from train.evaluate.summary import groups, interval
from train.evaluate.telling import ORACLE, few_scenes, unknown_scenes

SAME = 1e-6  # dB by which the input's PSNR may differ on another machine: the sum of squares is exact


class Loaded(NamedTuple):
    """An evaluation under the name that tables give it."""

    name: str
    path: Path
    results: dict[str, Any]


class Difference(NamedTuple):
    """Means over the pictures of one tier, and the mean paired difference to the first evaluation with its 95 %
    bootstrap interval over scenes (Nones of one scene); wins: the part of the pictures that are better than there."""

    mean: float
    difference: float
    low: float | None
    high: float | None
    wins: float


class Row(NamedTuple):
    """One tier: its name, how many pictures and scenes, by metric the mean of the inputs, and a `Difference` of every
    evaluation (zeros of the first)."""

    tier: str
    pictures: int
    scenes: int
    input: dict[str, float]
    metrics: dict[str, list[Difference]]


class Comparison(NamedTuple):
    """Evaluations of the same pictures. metrics: those that all have, as results.json describes them; rows: the
    headline's last; notes: in what they differ beside the model, and what was left out."""

    loaded: list[Loaded]
    metrics: dict[str, dict[str, Any]]
    rows: list[Row]
    notes: list[str]


def load_all(paths: Sequence[Path]) -> list[Loaded]:
    """The evaluations that paths name: files, folders with a results.json, or runs with `evaluations/`.

    Of a run the one is taken whose pictures all others have too. ValueError where that is none or several.
    """
    if len(paths) < 2:
        raise ValueError("name at least two evaluations to compare")
    found = [_candidates(Path(path).expanduser()) for path in paths]
    common = set.intersection(*({_pictures(each) for _, each in candidates} for candidates in found))
    loaded = []
    for path, candidates in zip(paths, found, strict=True):
        fitting = [each for each in candidates if _pictures(each[1]) in common] if len(candidates) > 1 else candidates
        if len(fitting) != 1:
            names = ", ".join(str(file.parent) for file, _ in fitting or candidates)
            what = "several of the same pictures" if fitting else "none of pictures that the others have too"
            raise ValueError(f"{path}: holds {what}: name one of {names}")
        loaded.append(fitting[0])
    names = _names([str(results["model"]["name"]) for _, results in loaded], [file.parent for file, _ in loaded])
    return [Loaded(name, *each) for name, each in zip(names, loaded, strict=True)]


def compare(loaded: Sequence[Loaded]) -> Comparison:
    """Paired differences of every evaluation to the first.

    ValueError where they are not of the same pairs: other data, other pictures, or the same names over other pixels.
    """
    first, notes = loaded[0], []
    tables = [{picture["key"]: picture for picture in each.results["pictures"]} for each in loaded]
    for each in loaded[1:]:
        _check_data(first, each)
    everything = list(dict.fromkeys(key for table in tables for key in table))
    keys = [key for key in everything if all(key in table for table in tables)]
    for each, table in zip(loaded, tables, strict=True):
        missing = len(everything) - len(table)
        if missing:
            notes.append(f"{each.name}: {missing} of {len(everything)} pictures are missing; they are left out of all")
    if not keys:
        raise ValueError(f"{first.path}: has no picture in common with the others")
    metrics = {
        name: m for name, m in first.results["metrics"].items() if all(name in e.results["metrics"] for e in loaded)
    }
    notes += [f"{each.name}: {ORACLE}" for each in loaded if each.results["model"].get("oracle")]
    for each in loaded:
        alone = [name for name in each.results["metrics"] if name not in metrics]
        if alone:
            notes.append(f"{each.name}: has {', '.join(alone)}, which others lack")
    for each, table in zip(loaded[1:], tables[1:], strict=True):
        _check_inputs(keys, tables[0], table, first, each)
        notes += _differing(first, each)
    rows = []
    for tier, belongs in groups([tables[0][key]["tier"] for key in keys]):
        some = [key for key in keys if belongs(tables[0][key]["tier"])]
        pictures = [tables[0][key] for key in some]
        row = {name: [_difference(name, metrics[name], some, tables[0], table) for table in tables] for name in metrics}
        inputs = {name: float(np.mean([picture["input"][name] for picture in pictures])) for name in metrics}
        rows.append(Row(tier, len(some), len({picture["scene"] for picture in pictures}), inputs, row))
    return Comparison(
        list(loaded), metrics, rows, notes + unknown_scenes(first.results["data"]) + few_scenes(rows[-1].scenes)
    )


def _difference(
    name: str,
    metric: Mapping[str, Any],
    keys: Sequence[str],
    first: Mapping[str, Mapping[str, Any]],
    other: Mapping[str, Mapping[str, Any]],
) -> Difference:
    before, after = (np.array([table[key]["restored"][name] for key in keys], np.float64) for table in (first, other))
    change = after - before
    low, high = interval(change, [first[key] for key in keys])
    wins = change < 0 if metric["better"] == "lower" else change > 0
    return Difference(float(after.mean()), float(change.mean()), low, high, float(wins.mean()))


def _candidates(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    if path.is_file() or (path / RESULTS).is_file():
        file = path / RESULTS if path.is_dir() else path
        return [(file, read_results(file))]
    inner = sorted((path / "evaluations").glob(f"*/{RESULTS}"))
    if not inner:
        raise ValueError(f"{path}: no {RESULTS} here, and no evaluations/ of a run: `sharpprior evaluate` makes them")
    return [(file, read_results(file)) for file in inner]


def _pictures(results: Mapping[str, Any]) -> str:
    return str(results["data"]["digest"])


def _names(names: list[str], folders: Sequence[Path]) -> list[str]:
    """Models' names, with their folders where models share one."""
    return [
        name if names.count(name) == 1 else f"{name} ({folder.name})"
        for name, folder in zip(names, folders, strict=True)
    ]


def _check_data(first: Loaded, other: Loaded) -> None:
    one, two = (each.results["data"] for each in (first, other))
    for name in ("layout", "split", "blur variant"):
        if one[name] != two[name]:
            raise ValueError(f"{first.path} and {other.path}: of other pictures: {name} {one[name]} and {two[name]}")


def _check_inputs(
    keys: Sequence[str],
    one: Mapping[str, Mapping[str, Any]],
    two: Mapping[str, Mapping[str, Any]],
    first: Loaded,
    other: Loaded,
) -> None:
    """Equal inputs have equal PSNR: anything else was another picture, whatever its name."""
    for key in keys:
        a, b = one[key]["input"]["psnr"], two[key]["input"]["psnr"]
        if abs(a - b) > SAME:
            raise ValueError(
                f"{first.path} and {other.path}: {key} was another picture (input {a:.4f} and {b:.4f} dB): evaluate "
                "both models on the same pairs"
            )


def _differing(first: Loaded, other: Loaded) -> list[str]:
    """Lines on settings that are not the same, which a difference may come from too."""
    lines = []
    for name in ("settings", "versions"):
        for line in differences(first.results[name], other.results[name]):
            if not line.startswith("metrics "):
                lines.append(f"{first.name} → {other.name}: {line}")
    for name in ("training data", "training blur", "device"):
        a, b = ((each.results["model"] if name != "device" else each.results)[name] for each in (first, other))
        if a != b:
            lines.append(f"{first.name} → {other.name}: {name} {_short(a)} → {_short(b)}")
    return lines


def _short(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
