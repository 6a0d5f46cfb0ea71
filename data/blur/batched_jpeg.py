"""Baseline JPEG, 4:2:0, of a batch of pictures on any device: what a codec loses, without writing a file.

The steps and tables are those of ITU-T T.81 (annex K) and of JFIF; scaling of the tables by quality, rounding and
chroma upsampling follow libjpeg, so the result is the CPU codec's up to rare differences of rounding.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

_LUMA = """
16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
"""
_CHROMA = """
17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99
"""
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))


def jpeg_batch(pictures: torch.Tensor, qualities: Sequence[int]) -> torch.Tensor:
    """Pictures [B, H, W, 3] uint8 RGB after JPEG, 4:2:0, each at its own quality of 1–100; same shape and dtype."""
    height, width = pictures.shape[1:3]
    colour = pictures.permute(0, 3, 1, 2).float()
    # Whole blocks of 16 px, the last row and column repeated.
    colour = F.pad(colour, (0, -width % 16, 0, -height % 16), mode="replicate")
    ycc = torch.stack([sum(w * colour[:, c] for c, w in enumerate(row)) for row in _TO_YCC], dim=1)
    ycc[:, 1:] += 128
    ycc = ycc.round().clamp(0, 255)
    chroma = F.avg_pool2d(ycc[:, 1:], 2) * 4
    # libjpeg rounds sums of four with a bias of 1 and 2 in turn from column to column.
    bias = 1 + torch.arange(chroma.shape[-1], device=pictures.device) % 2
    chroma = torch.floor((chroma.round() + bias) / 4)
    luma = _through_dct(ycc[:, :1], qualities, "luma")
    chroma = _through_dct(chroma, qualities, "chroma")
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False).round() - 128
    y, blue, red = luma[:, 0], chroma[:, 0], chroma[:, 1]
    rgb = torch.stack([y + 1.402 * red, y - 0.344136286 * blue - 0.714136286 * red, y + 1.772 * blue], dim=-1)
    return rgb[:, :height, :width].round().clamp(0, 255).to(torch.uint8)


def _through_dct(planes: torch.Tensor, qualities: Sequence[int], kind: str) -> torch.Tensor:
    """Planes [B, C, H, W] of values 0–255, sides multiples of 8, after 8×8 DCT, quantisation and back."""
    batch, channels, height, width = planes.shape
    # In float64, which no TF32 setting of the training rounds.
    blocks = (planes.double() - 128).reshape(batch, channels, height // 8, 8, width // 8, 8)
    basis = torch.from_numpy(_dct_basis()).to(planes.device)
    table = np.stack([quantisation(quality, kind) for quality in qualities])
    steps = torch.from_numpy(table).to(planes.device)[:, None, None, :, None, :]
    spectra = torch.einsum("ui,bcyixj,vj->bcyuxv", basis, blocks, basis)
    # libjpeg's transform gives whole eighths, and quantises them rounding halves away from zero.
    eighths = (spectra * 8).round()
    spectra = eighths.sign() * torch.floor((eighths.abs() + 4 * steps) / (8 * steps)) * steps
    back = torch.einsum("ui,bcyuxv,vj->bcyixj", basis, spectra, basis)
    return (back.reshape(planes.shape).round() + 128).clamp(0, 255).float()


def quantisation(quality: int, kind: str) -> np.ndarray:
    """Quantisation steps [8, 8] float64 of "luma" or "chroma" at a quality of 1–100, as libjpeg scales them."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = np.array((_LUMA if kind == "luma" else _CHROMA).split(), np.int64).reshape(8, 8)
    return np.clip((base * scale + 50) // 100, 1, 255).astype(np.float64)


@lru_cache(maxsize=1)
def _dct_basis() -> np.ndarray:
    """Orthonormal DCT-II [8, 8] float64: row u is the cosine of frequency u."""
    u, i = np.mgrid[:8, :8]
    basis = np.cos((2 * i + 1) * u * math.pi / 16) * 0.5
    basis[0] /= math.sqrt(2)
    return basis
