"""Classical deconvolution with the true kernel: what is possible for one who is told how the camera moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.blur.kernel import fast_dft_size

_DARK = 1e-4  # linear light below which a ratio says nothing
_REACHED = 1e-2  # share of a scene point's light that must have come into the picture for it to be estimated


def wiener(image: Tensor, kernel: np.ndarray, noise: float) -> Tensor:
    """Wiener deconvolution of sRGB [3, H, W] float32 in [0, 1] by the kernel [k, k] of a true convolution, clamped.

    In linear light. noise: ratio of noise to signal power. Beyond the borders the picture is continued by its nearest
    pixels, faded to its mean so that the ends meet. On the image's device.
    """
    light = to_linear(image)
    height, width = light.shape[-2:]
    reach = len(kernel)
    below, right = (fast_dft_size(n + 2 * reach) - n - reach for n in (height, width))
    padded = F.pad(light[None], (reach, right, reach, below), mode="replicate")[0]
    inside = _fade(reach, height, below)[:, None] * _fade(reach, width, right)
    mean = light.mean(dim=(-2, -1), keepdim=True)
    padded = mean + (padded - mean) * inside.to(light.device)
    transfer = _transfer(kernel, padded)
    inverse = transfer.conj() / (transfer.abs().square() + noise)
    restored = torch.fft.irfft2(torch.fft.rfft2(padded) * inverse, s=padded.shape[-2:])
    return to_srgb(restored[..., reach : reach + height, reach : reach + width])


def richardson_lucy(image: Tensor, kernel: np.ndarray, iterations: int) -> Tensor:
    """Richardson–Lucy deconvolution of sRGB [3, H, W] float32 in [0, 1] by the kernel [k, k] of a true convolution.

    In linear light, begun with the blurry picture. The scene is estimated beyond the borders too, as far as its light
    came into the picture (Bertero & Boccacci 2005), so that nothing is made up there. On the image's device.
    """
    return next(richardson_lucy_after(image, kernel, [iterations]))


def richardson_lucy_after(image: Tensor, kernel: np.ndarray, iterations: Sequence[int]) -> Iterator[Tensor]:
    """The result of `richardson_lucy` after each of these numbers of iterations, ascending."""
    light = to_linear(image)
    height, width = light.shape[-2:]
    reach = len(kernel) // 2
    after = [fast_dft_size(n + 2 * reach) - n - reach for n in (height, width)]
    scene = F.pad(light[None].clamp(min=_DARK), (reach, after[1], reach, after[0]), mode="replicate")[0]
    inside = (..., slice(reach, reach + height), slice(reach, reach + width))
    transfer = _transfer(kernel, scene)

    def through(picture: Tensor, filtered: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(picture) * filtered, s=picture.shape[-2:])

    seen = torch.zeros_like(scene[:1])
    seen[inside] = 1
    weight = through(seen, transfer.conj())
    reached, weight = weight > _REACHED, weight.clamp(min=_REACHED)
    ratio = torch.zeros_like(scene)
    for number in range(1, max(iterations) + 1):
        ratio[inside] = light / through(scene, transfer)[inside].clamp(min=_DARK)
        better = scene * through(ratio, transfer.conj()) / weight
        scene = torch.where(reached, better, scene).clamp(min=1e-2 * _DARK)
        if number in iterations:
            yield to_srgb(scene[inside])


def to_linear(image: Tensor) -> Tensor:
    """Linear light of sRGB values, both in [0, 1] (IEC 61966-2-1)."""
    return torch.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)


def to_srgb(light: Tensor) -> Tensor:
    """sRGB values of linear light, which is clamped to [0, 1]."""
    light = light.clamp(0, 1)
    return torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def _transfer(kernel: np.ndarray, canvas: Tensor) -> Tensor:
    """The kernel's transform on a canvas [3, H, W], its centre at the origin."""
    placed = torch.zeros_like(canvas[0])
    placed[: len(kernel), : len(kernel)] = torch.from_numpy(kernel).to(placed)
    return torch.fft.rfft2(placed.roll((-(len(kernel) // 2),) * 2, dims=(0, 1)))


def _fade(before: int, length: int, after: int) -> Tensor:
    """1 over `length` places, half a cosine down to 0 at either side."""
    rise, fall = (0.5 - 0.5 * torch.cos(torch.pi * (torch.arange(n) + 0.5) / n) for n in (before, after))
    return torch.cat([rise, torch.ones(length), fall.flip(0)])
