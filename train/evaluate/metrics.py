"""PSNR and SSIM of 8-bit RGB pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from skimage.metrics import structural_similarity

from data.blur import psnr as _psnr_uint8


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """8-bit RGB [H, W, 3] (or [B, H, W, 3]) of an sRGB tensor [(B,) 3, H, W] in [0, 1]: clamped, then rounded."""
    values = image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(values.movedim(-3, -1).cpu().numpy())


def psnr(restored: np.ndarray, sharp: np.ndarray) -> float:
    """PSNR in dB of uint8 RGB [H, W, 3]: 10·log10(255² / mean squared error over all pixels and channels), no border
    crop; infinite for equal pictures. ValueError if the shapes differ."""
    if restored.shape != sharp.shape or restored.dtype != np.uint8 or sharp.dtype != np.uint8:
        raise ValueError(
            f"PSNR compares two uint8 pictures of one shape, not {restored.dtype} {restored.shape} "
            f"with {sharp.dtype} {sharp.shape}"
        )
    return float(_psnr_uint8(restored, sharp))


def ssim(restored: np.ndarray, sharp: np.ndarray) -> float:
    """`ssim` of uint8 RGB [H, W, 3]: scikit-image's, Gaussian window σ 1.5, per channel, mean (Wang et al. 2004).

    Not the 3-D variant that papers print for GoPro and HIDE; the two differ by about 0.02.
    """
    return float(
        structural_similarity(
            restored,
            sharp,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=2,
            data_range=255,
        )
    )


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
