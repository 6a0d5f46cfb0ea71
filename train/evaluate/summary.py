"""What the pictures' numbers come to: means per severity tier, or per bin of input PSNR, with intervals over scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data.blur import TIERS
from train.evaluate.bins import BINS
from train.evaluate.metrics import bootstrap_mean_interval
from train.evaluate.scores import INPUT, INTERVAL_LEVEL, SEVERE, TRIVIAL

ALL, HARD = "all", " + ".join(SEVERE)
ALIGNED = "_aligned"  # the end of names of metrics after RealBlur's alignment

Picture = Mapping[str, Any]


def groups(tiers: Sequence[str]) -> list[tuple[str, Callable[[str], bool]]]:
    """(name, which tiers belong to it) of every row of a table, the headline's row last: tiers of synthetic pairs and
    the two hard ones together, or bins of input PSNR and all of them together."""
    found = set(tiers)
    if found <= set(TIERS):
        rows = [tier for tier in TIERS if tier in found]
        hard = found & set(SEVERE)
        return [(name, name.__eq__) for name in rows] + ([(HARD, SEVERE.__contains__)] if len(hard) == 2 else [])
    rows = [name for name in BINS if name in found] + sorted(found - set(BINS))
    return [(name, name.__eq__) for name in rows] + [(ALL, lambda tier: True)]


def interval(values: Sequence[float], pictures: Sequence[Picture]) -> tuple[float | None, float | None]:
    """The 95 % bootstrap interval of the mean over scenes; Nones where there is one scene only."""
    bounds = bootstrap_mean_interval(values, [picture["scene"] for picture in pictures], level=INTERVAL_LEVEL)
    return tuple(float(bound) if np.isfinite(bound) else None for bound in bounds)


def summarise(pictures: Sequence[Picture], metric: str) -> list[dict[str, Any]]:
    """A row for every group of `groups`, the headline's last.

    Gains are of `metric` (psnr or psnr_aligned), dB: over the input, and over the best trivial, which is whichever of
    the input and of the trivial yardsticks has the highest mean in that row. intervals: of the restored pictures' mean.
    """
    rows = []
    for name, belongs in groups([picture["tier"] for picture in pictures]):
        some = [picture for picture in pictures if belongs(picture["tier"])]
        columns = {INPUT: [picture[INPUT] for picture in some]}
        for yardstick in some[0]["yardsticks"]:
            if all(yardstick in picture["yardsticks"] for picture in some):
                columns[yardstick] = [picture["yardsticks"][yardstick] for picture in some]
        means = {column: _means(values) for column, values in columns.items()}
        trivial = max((column for column in means if column in TRIVIAL), key=lambda column: means[column][metric])
        restored = [picture["restored"] for picture in some]
        row = {"tier": name, "pictures": len(some), "scenes": len({picture["scene"] for picture in some})}
        for over, prefix in ((INPUT, ""), (trivial, "over_")):
            gains = [after[metric] - before[metric] for after, before in zip(restored, columns[over], strict=True)]
            low, high = interval(gains, some)
            row |= {
                "over_trivial" if prefix else "gain": float(np.mean(gains)),
                prefix + "low": low,
                prefix + "high": high,
            }
        row |= {"trivial": trivial, "input": means.pop(INPUT), "restored": _means(restored), "yardsticks": means}
        row["intervals"] = {name: interval([each[name] for each in restored], some) for name in row["restored"]}
        row["better"] = float(
            np.mean([after[metric] > before[metric] for after, before in zip(restored, columns[INPUT], strict=True)])
        )
        rows.append(row)
    return rows


def _means(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([each[name] for each in values])) for name in values[0]}
