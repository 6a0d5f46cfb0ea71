"""PSNR and SSIM of 8-bit RGB pictures."""

from __future__ import annotations

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
