"""Metrics of 8-bit RGB pictures against the truth by formulas alone, in fp64: PSNR, SSIM in two variants, and the
similarity of gradient magnitudes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

RADIUS, SIGMA = 5, 1.5  # px: the window of Wang et al. 2004
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
LUMA = (0.299, 0.587, 0.114)  # Rec. 601, as MATLAB's rgb2gray
EQUAL = 60.0  # dB that equal pictures count as
GRADIENT_FLOOR = 170.0  # T of Xue et al. 2014, for luma in 0 … 255


def psnr(restored: Tensor, sharp: Tensor) -> Tensor:
    """PSNR in dB of uint8 RGB [B, 3, H, W] → float64 [B] on the CPU: 10·log10(255² / mean squared difference over all
    pixels and channels), inf for equal pictures; the sum of squares is exact."""
    difference = restored.to(torch.int32) - sharp.to(torch.int32)
    squares = difference.square().sum(dim=(1, 2, 3), dtype=torch.int64).double().cpu()
    return 10 * torch.log10(255.0**2 * sharp[0].numel() / squares)


def ssim(restored: Tensor, sharp: Tensor) -> Tensor:
    """`ssim` of uint8 RGB [B, 3, H, W] → float64 [B] on the CPU: that of Wang et al. 2004 per channel, mean.

    Equal to scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    channel_axis=…, data_range=255)`, whose mean leaves out the 5 px at each side that the window does not fill. Not the
    3-D variant that papers print for GoPro and HIDE; the two differ by about 0.02. ValueError below 11 px.
    """
    if min(sharp.shape[-2:]) <= 2 * RADIUS:
        raise ValueError(f"ssim of {tuple(sharp.shape[-2:])} px: its window is {2 * RADIUS + 1} px: larger pictures")
    planes = (image.flatten(0, 1)[:, None].split(1 if image.is_cpu else len(image) * 3) for image in (restored, sharp))
    means = [_ssim_map(x, y, _smooth).mean(dim=(1, 2, 3)) for x, y in zip(*planes, strict=True)]  # a plane fits a cache
    return torch.cat(means).view(-1, 3).mean(dim=1).cpu()


def ssim_3d(restored: Tensor, sharp: Tensor) -> Tensor:
    """`ssim_3d` of uint8 RGB [B, 3, H, W] → float64 [B] on the CPU: MATLAB's `ssim` of the array H×W×3.

    What papers print for GoPro and HIDE: the window is an 11×11×11 Gaussian, σ 1.5, over rows, columns and the three
    channels, borders replicated in all three directions, and the mean is over the whole map.
    """
    across = _across_channels(sharp.device)

    def smooth(image: Tensor) -> Tensor:
        mixed = torch.einsum("dc,bchw->bdhw", across, image)
        return _smooth(F.pad(mixed, (RADIUS,) * 4, mode="replicate"))

    return _ssim_map(restored, sharp, smooth).mean(dim=(1, 2, 3)).cpu()


def gms(restored: Tensor, sharp: Tensor) -> Tensor:
    """Mean gradient-magnitude similarity (GMSM of Xue et al. 2014) of uint8 RGB [B, 3, H, W] → float64 [B] on the CPU;
    1 for equal pictures."""
    return _gradient_similarity(restored, sharp).mean(dim=(1, 2)).cpu()


def gmsd(restored: Tensor, sharp: Tensor) -> Tensor:
    """GMSD of Xue et al. 2014, the standard deviation of that similarity over the picture (n − 1, as MATLAB's std2), of
    uint8 RGB [B, 3, H, W] → float64 [B] on the CPU; 0 for equal pictures, lower is better."""
    return _gradient_similarity(restored, sharp).std(dim=(1, 2)).cpu()


def _ssim_map(restored: Tensor, sharp: Tensor, smooth: Callable[[Tensor], Tensor]) -> Tensor:
    x, y = restored.double(), sharp.double()
    mx, my = smooth(x), smooth(y)
    vx, vy, vxy = smooth(x * x) - mx * mx, smooth(y * y) - my * my, smooth(x * y) - mx * my
    return ((2 * mx * my + C1) * (2 * vxy + C2)) / ((mx * mx + my * my + C1) * (vx + vy + C2))


def _window() -> list[float]:
    taps = torch.exp(-torch.arange(-RADIUS, RADIUS + 1).double().square() / (2 * SIGMA**2))
    return (taps / taps.sum()).tolist()


def _smooth(image: Tensor) -> Tensor:
    """Gaussian mean of the places that the window fills: [B, C, H, W] → [B, C, H − 10, W − 10].

    Sums of shifted images, and no convolution: on a CPU PyTorch's of fp64 is ten times slower, and this one's result
    does not depend on what else is in the batch.
    """
    taps = _window()
    for axis in (-1, -2):
        length = image.shape[axis] - 2 * RADIUS
        total = image.narrow(axis, RADIUS, length) * taps[RADIUS]
        for k in range(RADIUS):
            both = image.narrow(axis, k, length) + image.narrow(axis, 2 * RADIUS - k, length)
            total.add_(both, alpha=taps[k])
        image = total
    return image


def _across_channels(device: torch.device) -> Tensor:
    """[3, 3]: what the window along the third axis gives each channel, with R and B replicated beyond the ends."""
    weights = torch.zeros(3, 3, dtype=torch.float64)
    for here in range(3):
        for offset, tap in enumerate(_window(), -RADIUS):
            weights[here, min(max(here + offset, 0), 2)] += tap
    return weights.to(device)


def _gradient_similarity(restored: Tensor, sharp: Tensor) -> Tensor:
    """Map [B, ⌈H/2⌉, ⌈W/2⌉] of the similarity of gradient magnitudes, as the authors' script computes it."""
    first, second = (_gradient_magnitude(image) for image in (restored, sharp))
    return (2 * first * second + GRADIENT_FLOOR) / (first.square() + second.square() + GRADIENT_FLOOR)


def _gradient_magnitude(image: Tensor) -> Tensor:
    """Prewitt gradient of the luma's 2×2 means, zeros beyond the border as MATLAB's conv2 has them."""
    red, green, blue = image.double().unbind(dim=1)
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    height, width = luma.shape[-2:]
    luma = F.pad(luma, (0, width % 2, 0, height % 2))
    half = (luma[:, ::2, ::2] + luma[:, ::2, 1::2] + luma[:, 1::2, ::2] + luma[:, 1::2, 1::2]) / 4
    p = F.pad(half, (1, 1, 1, 1))
    columns = p[:, :-2] + p[:, 1:-1] + p[:, 2:]
    rows = p[..., :-2] + p[..., 1:-1] + p[..., 2:]
    across, down = (columns[..., 2:] - columns[..., :-2]) / 3, (rows[:, 2:] - rows[:, :-2]) / 3
    return (across.square() + down.square()).sqrt()
