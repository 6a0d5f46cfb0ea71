"""Kernels measured and applied to pictures, for the tests of blur."""

import cv2
import numpy as np

from data.blur.kernel import convolve_planes


def centroid_of(kernel: np.ndarray) -> tuple[float, float]:
    """Centroid (y, x) in px of a kernel [k, k], measured from its centre."""
    at = np.arange(len(kernel), dtype=np.float64) - len(kernel) // 2
    mass = kernel.astype(np.float64)
    return float(at @ mass.sum(1) / mass.sum()), float(at @ mass.sum(0) / mass.sum())


def convolve_valid(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """`convolve_planes` of a picture [H, W, C] float32."""
    planes = convolve_planes(cv2.split(image), kernel)
    return cv2.merge(planes).reshape(*planes[0].shape, -1)
