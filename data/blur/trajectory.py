"""Gaussian-process camera shake: smooth random paths, and what every path has in common (extent, sampling)."""

import math

import numpy as np

# Base samples of a path, uniform in exposure time. The shortest correlation length, .15 of the exposure, then spans
# 38 of them: straight pieces in between are indistinguishable from the smooth path.
SAMPLES = 256


def extent_of(path: np.ndarray) -> float:
    """Extent in px of a path [N, 2]: the larger side of its bounding box."""
    return float(np.ptp(path, axis=0).max())


def scale_to_extent(path: np.ndarray, extent: float) -> np.ndarray:
    """The path [N, 2] (y, x) scaled about its first point so that its extent is `extent` px, float64."""
    size = extent_of(path)
    if not size > 0:
        raise ValueError("a path that does not move cannot be scaled to an extent; draw another")
    return (path - path[:1]) * (extent / size)


def rotate(path: np.ndarray, angle: float) -> np.ndarray:
    """The path [N, 2] turned by `angle` radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return path @ np.array([[cos, -sin], [sin, cos]])


def densify(path: np.ndarray, step: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """Points at most `step` px apart along a path uniform in time, with the exposure time each stands for.

    path [N, 2] px → points [M, 2], weights [M] that sum to 1. Every straight piece lasts equally long, so a fast piece
    gets more points of less weight each: the streak is unbroken and its brightness still follows the speed.
    """
    pieces = np.diff(path, axis=0)
    counts = np.maximum(1, np.ceil(np.hypot(pieces[:, 0], pieces[:, 1]) / step)).astype(np.int64)
    owner = np.repeat(np.arange(len(pieces)), counts)
    first = np.cumsum(counts) - counts
    # Midpoints of the sub-pieces: the rule that keeps the path's mean exact.
    along = (np.arange(len(owner)) - first[owner] + 0.5) / counts[owner]
    points = path[owner] + along[:, None] * pieces[owner]
    weights = 1.0 / (counts[owner] * len(pieces))
    return points, weights


def gaussian_process_path(rng: np.random.Generator, length: float, anisotropy: float, angle: float) -> np.ndarray:
    """Camera shake as two independent Gaussian processes over the exposure, Matérn 5/2: path [N, 2], any scale.

    length: correlation length in exposures; anisotropy: ratio of the second axis's deviation to the first's;
    angle: radians by which the axes are turned. Exact sampling by circulant embedding (Dietrich and Newsam 1997):
    the covariance is wrapped around a ring of several exposures, whose eigenvalues are its FFT.
    """
    # On a ring of this length the wrapped copies add less than 1e-6 of the variance.
    turns = max(2, math.ceil(1 + 8 * length))
    size = turns * SAMPLES
    lag = np.arange(size) / SAMPLES
    covariance = sum(_matern52((lag + wrap * turns) / length) for wrap in (-1, 0, 1))
    eigenvalues = np.maximum(np.fft.fft(covariance).real, 0.0)  # negative ones are rounding only
    white = rng.standard_normal(size) + 1j * rng.standard_normal(size)
    sampled = np.fft.fft(np.sqrt(eigenvalues / size) * white)[: SAMPLES + 1]
    # Real and imaginary parts are two independent processes.
    return rotate(np.stack([sampled.real, anisotropy * sampled.imag], axis=1), angle)


def _matern52(distance: np.ndarray) -> np.ndarray:
    d = math.sqrt(5.0) * np.abs(distance)
    return (1.0 + d + d * d / 3.0) * np.exp(-d)
