"""Defocus: the disc that a point out of focus becomes, alone or on top of a motion."""

import math

import cv2
import numpy as np

_FINE = 8  # samples a px and side


def disc_kernel(radius: float) -> np.ndarray:
    """Kernel [k, k] float32, k odd, of a uniform disc of `radius` px: sums to 1, centred, smooth at its edge."""
    reach = math.ceil(radius)
    at = (np.arange((2 * reach + 1) * _FINE) + 0.5) / _FINE - reach - 0.5
    inside = (at[:, None] ** 2 + at[None, :] ** 2 <= radius * radius).astype(np.float64)
    kernel = inside.reshape(2 * reach + 1, _FINE, 2 * reach + 1, _FINE).mean(axis=(1, 3))
    return (kernel / kernel.sum()).astype(np.float32)


def out_of_focus(kernel: np.ndarray, radius: float) -> np.ndarray:
    """A motion's kernel [k, k] seen out of focus as well: larger by the disc's reach at every side."""
    disc = disc_kernel(radius)
    reach = len(disc) // 2
    padded = cv2.copyMakeBorder(kernel, reach, reach, reach, reach, cv2.BORDER_CONSTANT)
    mixed = cv2.filter2D(padded.astype(np.float64), -1, disc.astype(np.float64), borderType=cv2.BORDER_CONSTANT)
    return (mixed / mixed.sum()).astype(np.float32)
