"""What a phone does to a raw picture before anybody sees it: demosaic, denoise, sharpen; between noise and JPEG.

Each step is a smooth function of small filters, so that the same is computed in batches on a GPU.
"""

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np

COLOUR = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], np.float32) / 4  # fills in red and blue of a Bayer mosaic
GREEN = np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]], np.float32) / 4
LUMA = (0.25, 0.5, 0.25)


def gaussian(sigma: float, reach: int) -> np.ndarray:
    """Weights [2·reach + 1] float32 of a Gaussian."""
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)


SMALL, WIDE, HALO_REACH = gaussian(0.8, 1), gaussian(1.2, 2), 4


@lru_cache(maxsize=4)
def mosaic_masks(size: int) -> np.ndarray:
    """Where an RGGB sensor of size × size px measures red, green and blue, [3, S, S] float32."""
    masks = np.zeros((3, size, size), np.float32)
    masks[0, ::2, ::2] = masks[1, ::2, 1::2] = masks[1, 1::2, ::2] = masks[2, 1::2, 1::2] = 1
    return masks


def develop(planes: Sequence[np.ndarray], denoise: float, shot: float, read: float) -> list[np.ndarray]:
    """Demosaicked and denoised light, planes R, G, B [S, S] float32 of noisy light.

    denoise: 0 to 1 and more, how many deviations of noise the filter believes in; shot, read: of the sensor's noise.
    """
    masks = mosaic_masks(len(planes[0]))
    kernels = (COLOUR, GREEN, COLOUR)
    red, green, blue = (_filter(p * mask, k) for p, mask, k in zip(planes, masks, kernels, strict=True))
    if denoise <= 0:
        return [red, green, blue]
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    base = _smooth(luma, SMALL)
    detail = luma - base
    variance = np.float32(denoise**2) * (np.float32(shot) * np.maximum(base, 0) + np.float32(read**2))
    # Wiener's weight of a detail against the noise; colour is smoothed more, as eyes see it less.
    kept = base + detail * detail * detail / np.maximum(detail * detail + variance, np.float32(1e-12))
    share = np.float32(min(denoise, 1.0))
    red, blue = (kept + (1 - share) * (plane - luma) + share * _smooth(plane - luma, WIDE) for plane in (red, blue))
    return [red, (kept - LUMA[0] * red - LUMA[2] * blue) / np.float32(LUMA[1]), blue]


def sharpen(values: np.ndarray, amount: float, sigma: float) -> np.ndarray:
    """Display values [S, S, 3] float32 with the halo that a phone's sharpening leaves: v + amount·(v − blurred v)."""
    weights = gaussian(sigma, HALO_REACH)
    blurred = cv2.sepFilter2D(values, -1, weights, weights, borderType=cv2.BORDER_REFLECT_101)
    return values + np.float32(amount) * (values - blurred)


def _filter(plane: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return cv2.filter2D(plane, -1, kernel, borderType=cv2.BORDER_REFLECT_101)


def _smooth(plane: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return cv2.sepFilter2D(plane, -1, weights, weights, borderType=cv2.BORDER_REFLECT_101)
