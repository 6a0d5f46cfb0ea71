"""What a restored picture is measured by: a table of metrics of 8-bit RGB pictures, and the interval of their means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.names import choose
from train.evaluate import blind, fidelity, perceptual


def to_uint8(image: Tensor) -> Tensor:
    """8-bit RGB of an sRGB tensor [(B,) 3, H, W] in [0, 1], of the same shape and device: clamped, then rounded."""
    return image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)


def as_picture(image: Tensor) -> np.ndarray:
    """uint8 [3, H, W] on any device → contiguous [H, W, 3]."""
    return np.ascontiguousarray(image.movedim(0, -1).cpu().numpy())


class Metric(NamedTuple):
    """A metric of (restored, sharp), both uint8 RGB [B, 3, H, W] on one device → float64 [B] on the CPU.

    label, note: what reports call it and say of it; digits behind the point; cap: larger values count as this one, as
    infinity has no mean; better: higher or lower; scope: every (in training's evaluations too), full (in
    `sharpprior evaluate` alone) or asked (there, with `--also`); here: whether it can be computed on this machine.
    """

    measure: Callable[[Tensor, Tensor], Tensor]
    label: str
    note: str
    digits: int
    cap: float = inf
    better: Literal["higher", "lower"] = "higher"
    scope: Literal["every", "full", "asked"] = "every"
    here: Callable[[], bool] = lambda: True


# A function and a row make a new metric: scores, metrics.jsonl, TensorBoard and reports have it then. `psnr` stays
# first: gains are of it.
METRICS = {
    "psnr": Metric(
        fidelity.psnr,
        "PSNR",
        "RGB, whole picture, 8 bit, mean over pairs (equal pictures count as 60 dB)",
        digits=2,
        cap=fidelity.EQUAL,
    ),
    "ssim": Metric(fidelity.ssim, "SSIM", "as scikit-image, Gaussian window σ 1.5, per channel", digits=4),
    "ssim_3d": Metric(
        fidelity.ssim_3d,
        "SSIM 3-D",
        "as MATLAB's ssim of H×W×3, what papers print for GoPro and HIDE",
        digits=4,
        scope="full",
    ),
    "gms": Metric(
        fidelity.gms, "GMS", "mean similarity of gradient magnitudes (Xue et al. 2014)", digits=4, scope="full"
    ),
    "gmsd": Metric(
        fidelity.gmsd,
        "GMSD",
        "standard deviation of that similarity over the picture, lower is better",
        digits=4,
        better="lower",
        scope="full",
    ),
    "features": Metric(
        perceptual.features,
        "features",
        "distance of EfficientNet-Lite0's unit-length features, lower is better",
        digits=4,
        better="lower",
        scope="full",
    ),
    "blur": Metric(
        blind.blur,
        "blur",
        "perceived blur (Crete et al. 2007): it needs no sharp picture and takes false edges for sharpness; lower is "
        "better",
        digits=3,
        better="lower",
        scope="full",
    ),
    "classes": Metric(
        perceptual.classes,
        "classes",
        "agreement of EfficientNet-Lite2's class probabilities, 1 where it sees the same in both pictures",
        digits=3,
        scope="asked",
        here=perceptual.classes_here,
    ),
    "lpips": Metric(
        perceptual.lpips,
        "LPIPS",
        "AlexNet, version 0.1 (Zhang et al. 2018), lower is better",
        digits=4,
        better="lower",
        scope="full",
        here=perceptual.lpips_here,
    ),
    "dists": Metric(
        perceptual.dists,
        "DISTS",
        "VGG16 (Ding et al. 2020), lower is better",
        digits=4,
        better="lower",
        scope="full",
        here=perceptual.dists_here,
    ),
}

AT_ONCE = 2**22  # pixels of pictures measured together on a GPU: what their fp64 maps need stays below a GiB


def metric_names(scope: Literal["every", "full"] = "every", also: Sequence[str] = ()) -> tuple[str, ...]:
    """The metrics of a scope that can be computed here, in the table's order, and those that are asked for beside them;
    full has those of every too. ValueError where one that is asked for is unknown, or cannot be computed here."""
    for name in also:
        if not METRICS[choose("metric", name, METRICS)].here():
            raise ValueError(f"metric {name} is not here: docs/METRICS.md says which package and weights it needs")
    wanted = ("every",) if scope == "every" else ("every", "full")
    return tuple(name for name, metric in METRICS.items() if name in also or (metric.scope in wanted and metric.here()))


@torch.no_grad()
def measured(restored: Tensor, sharp: Tensor, names: Sequence[str]) -> list[dict[str, float]]:
    """Metrics of each picture of a batch, by name: uint8 RGB [B, 3, H, W] on one device.

    A picture's values are the same in any batch (networks' but for rounding). ValueError where shapes or dtypes differ,
    or a name is not of the table.
    """
    for image in (restored, sharp):
        if image.dtype != torch.uint8 or image.ndim != 4 or image.shape[1] != 3 or image.numel() == 0:
            raise ValueError(f"metrics of {image.dtype} {tuple(image.shape)}: give uint8 RGB [B, 3, H, W]")
    if restored.shape != sharp.shape:
        raise ValueError(f"metrics of shapes {tuple(restored.shape)} and {tuple(sharp.shape)}: give pictures of one")
    rows = [choose("metric", name, METRICS) for name in names]
    size = 1 if sharp.is_cpu else max(1, AT_ONCE // (sharp.shape[-2] * sharp.shape[-1]))
    result = []
    with torch.autocast(sharp.device.type, enabled=False):
        for first, second in zip(restored.split(size), sharp.split(size), strict=True):
            columns = [METRICS[name].measure(first, second).clamp(max=METRICS[name].cap).tolist() for name in rows]
            result += [dict(zip(rows, values, strict=True)) for values in zip(*columns, strict=True)]
    return result


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
