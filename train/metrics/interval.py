"""Bootstrap intervals of a mean over samples that come in clusters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bootstrap_mean_interval(
    values: Sequence[float], clusters: Sequence[str], *, level: float = 0.95, draws: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, resampling whole clusters.

    Pairs made from one picture are not independent, so pictures are drawn, each with all its values. With one
    cluster there is nothing to resample: (nan, nan). ValueError on empty input or unequal lengths.
    """
    if not len(values) or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values with {len(clusters)} clusters: expected as many, and at least one")
    names, member = np.unique(np.asarray(list(clusters)), return_inverse=True)
    if len(names) < 2:
        return float("nan"), float("nan")
    sums = np.bincount(member, weights=np.asarray(values, np.float64))
    counts = np.bincount(member)
    drawn = np.random.Generator(np.random.Philox(seed)).integers(len(names), size=(draws, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
