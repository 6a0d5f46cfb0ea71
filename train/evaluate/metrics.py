"""What a restored picture is measured by: a table of metrics of 8-bit RGB pictures, and the interval of their means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from skimage.metrics import structural_similarity

from data.image import psnr


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """8-bit RGB [H, W, 3] (or [B, H, W, 3]) of an sRGB tensor [(B,) 3, H, W] in [0, 1]: clamped, then rounded."""
    values = image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(values.movedim(-3, -1).cpu().numpy())


def ssim(restored: np.ndarray, sharp: np.ndarray) -> float:
    """`ssim` of uint8 RGB [H, W, 3]: scikit-image's, Gaussian window σ 1.5, per channel, mean (Wang et al. 2004).

    Not the 3-D variant that papers print for GoPro and HIDE; the two differ by about 0.02.
    """
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(restored, sharp, **window, channel_axis=2, data_range=255))


class Metric(NamedTuple):
    """A metric of (restored, sharp), both uint8 RGB [H, W, 3]. label, note: what reports call it and say of it; digits
    behind the point; cap: larger values count as this one, as infinity has no mean."""

    measure: Callable[[np.ndarray, np.ndarray], float]
    label: str
    note: str
    digits: int
    cap: float = inf


# A function and a row make a new metric: scores, metrics.jsonl, TensorBoard and reports have it then. `psnr` stays
# first: gains are of it.
METRICS = {
    "psnr": Metric(
        psnr, "PSNR", "RGB, whole crop, 8 bit, mean over pairs (equal pictures count as 60 dB)", digits=2, cap=60.0
    ),
    "ssim": Metric(ssim, "SSIM", "scikit-image, Gaussian window σ 1.5, per channel", digits=4),
}


def measured(restored: np.ndarray, sharp: np.ndarray) -> dict[str, float]:
    """Every metric of the table, by name. ValueError where shapes or dtypes differ."""
    return {name: min(float(metric.measure(restored, sharp)), metric.cap) for name, metric in METRICS.items()}


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
