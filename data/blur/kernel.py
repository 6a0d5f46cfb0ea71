"""Uniform blur kernels: a path splatted to sub-pixel accuracy, and true convolution with it."""

from collections.abc import Sequence

import cv2
import numpy as np

from data.blur.trajectory import densify

IDENTITY = np.ones((1, 1), np.float32)

# Below this size a direct convolution beats the transform (measured at 256²).
_DIRECT = 9


def kernel_of_path(path: np.ndarray) -> np.ndarray:
    """Kernel [k, k] float32, k odd, of a path [N, 2] (y, x) in px, uniform in time.

    Its centroid lies on its centre: a restoration is then not asked to shift the picture. Weights sum to 1 and form
    one connected streak. A scene point at the origin leaves the mark kernel[k//2 + y, k//2 + x] (true convolution).
    """
    points, weights = densify(np.asarray(path, np.float64))
    points = points - weights @ points
    radius = int(np.floor(np.abs(points).max())) + 1
    size = 2 * radius + 1
    corner = np.floor(points).astype(np.int64)
    part = points - corner
    corner += radius
    # Bilinear splat: the four weights of a point have the point itself as their centre of mass.
    flat = corner[:, 0] * size + corner[:, 1]
    y, x = part[:, 0], part[:, 1]
    kernel = np.zeros(size * size)
    for shift, share in ((0, (1 - y) * (1 - x)), (1, (1 - y) * x), (size, y * (1 - x)), (size + 1, y * x)):
        kernel += np.bincount(flat + shift, weights * share, minlength=size * size)[: size * size]
    return (kernel / kernel.sum()).astype(np.float32).reshape(size, size)


def convolve_planes(planes: Sequence[np.ndarray], kernel: np.ndarray) -> list[np.ndarray]:
    """True convolution, valid part only, of planes [H, W] float32 with kernel [k, k], k odd → [H − k + 1, W − k + 1].

    out(y, x) = Σ kernel[k//2 + dy, k//2 + dx] · plane(y − dy, x − dx); the kernel is transformed once for all of them.
    """
    size = len(kernel)
    if size == 1:
        return [plane * kernel[0, 0] for plane in planes]
    if size > _DIRECT:
        return _convolve_by_dft(planes, kernel)
    flipped, valid = cv2.flip(kernel, -1), slice(size // 2, -(size // 2))
    return [cv2.filter2D(p, cv2.CV_32F, flipped, borderType=cv2.BORDER_REPLICATE)[valid, valid] for p in planes]


def fast_dft_size(length: int) -> int:
    """Smallest multiple of 16 ≥ length without a prime factor above 5: twice as fast as odd sizes such as 405."""
    return 16 * cv2.getOptimalDFTSize(-(-length // 16))


def _convolve_by_dft(planes: Sequence[np.ndarray], kernel: np.ndarray) -> list[np.ndarray]:
    planes, kernel = _without_empty_rim(planes, kernel)
    (rows, columns), (height, width) = kernel.shape, planes[0].shape
    # The wrap of a circular convolution stays inside the first k − 1 rows and columns, which are not valid anyway.
    padded = np.zeros((fast_dft_size(height), fast_dft_size(width)), np.float32)
    padded[:rows, :columns] = kernel
    # OpenCV's `nonzeroRows` would spare work, but takes a path three times slower than the plain transform.
    transfer = cv2.dft(padded)
    padded[:] = 0
    result = []
    for plane in planes:
        padded[:height, :width] = plane
        product = cv2.mulSpectrums(cv2.dft(padded), transfer, 0)
        whole = cv2.dft(product, flags=cv2.DFT_INVERSE | cv2.DFT_SCALE | cv2.DFT_REAL_OUTPUT)
        result.append(whole[rows - 1 : height, columns - 1 : width])
    return result


def _without_empty_rim(planes: Sequence[np.ndarray], kernel: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Kernel without its empty outer rows and columns, planes without what only those would have read.

    A streak is often long one way only, and off the middle of its square: a third of the transform's pixels are spared.
    """
    used_rows, used_columns = np.flatnonzero(kernel.any(axis=1)), np.flatnonzero(kernel.any(axis=0))
    top, bottom, left, right = used_rows[0], used_rows[-1], used_columns[0], used_columns[-1]
    last = len(kernel) - 1
    height, width = planes[0].shape
    rows, columns = slice(last - bottom, height - top), slice(last - right, width - left)
    return [plane[rows, columns] for plane in planes], kernel[top : bottom + 1, left : right + 1]
