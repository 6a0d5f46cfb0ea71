"""Camera rotation: the scene seen through a row of homographies K R(w(t)) K⁻¹, so the blur varies over the picture."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from data.blur.kernel import kernel_of_path
from data.blur.trajectory import gaussian_process_path

# Poses are this many px apart at the crop's fastest point, so less elsewhere: a bilinear sample is two px wide, hence
# a streak has no gaps.
_STEP = 1.5
_POSES, _LARGE_POSES = (12, 160), (12, 640)  # up to an extent of 160 px, and above it

# Most px by which the light of any pixel of a crop may come, on average, from beside the pixel.
_SHIFT = 0.015


@dataclass(frozen=True)
class Frame:
    """Where a crop lies: photo height and width, and the crop's top, left and size, all px."""

    height: int
    width: int
    top: int
    left: int
    size: int


@dataclass(frozen=True)
class Rotation:
    """Poses of a rotating camera as seen by a crop.

    homographies [N, 3, 3] float64 map (column, row, 1) of an output pixel to where its light comes from, both counted
    from the crop's first pixel; weights [N] are shares of the exposure. kernel: the blur at the crop's centre.
    margin: px the poses reach beyond the crop. extent: mean over the crop, extent_max: its largest, px. shift: largest
    distance of a pixel's mean place over the exposure from the pixel itself, px.
    """

    homographies: np.ndarray
    weights: np.ndarray
    kernel: np.ndarray
    margin: int
    extent: float
    extent_max: float
    shift: float


def reach_of(extent: float) -> int:
    """Most px that a blur of this extent may need around a crop, whatever its generator."""
    return math.ceil(1.5 * extent) + 16


def draw_rotation(
    rng: np.random.Generator, extent: float, frame: Frame, *, correlation: tuple[float, float] = (0.15, 0.8)
) -> tuple[Rotation, dict[str, float]]:
    """A random rotation whose extent, averaged over the crop, is `extent` px; and the parameters it was drawn with.

    The photo is taken for a part of a larger virtual frame, so that the principal point may lie outside it, as it does
    for a tile of a photograph. Focal length: f₀·2^U(−1, 2) with f₀ the virtual frame's longer side, longer where an
    extent asks for it. correlation: range of the path's correlation length, in exposures.
    """
    enlarge = 2.0 ** rng.uniform(0.0, 1.5)
    rows, columns = enlarge * frame.height, enlarge * frame.width
    principal = np.array(
        [
            columns / 2 - rng.uniform(0.0, columns - frame.width) - frame.left,
            rows / 2 - rng.uniform(0.0, rows - frame.height) - frame.top,
        ]
    )
    focal = float(max(rows, columns) * 2.0 ** rng.uniform(-1.0, 2.0))
    length, anisotropy, angle = rng.uniform(*correlation), rng.uniform(0.3, 1.0), rng.uniform(0.0, 2.0 * math.pi)
    tilt = gaussian_process_path(rng, length, anisotropy, angle)
    roll = gaussian_process_path(rng, length, 1.0, 0.0)[:, :1] * rng.uniform(0.0, 2.0)
    for _ in range(24):
        # Roll moves the crop's edge as many px, in proportion, as tilt moves the whole crop.
        angles = np.concatenate([tilt, roll * (focal / frame.size)], axis=1)
        motion = rotation_of(angles, focal, principal, frame.size, extent)
        if motion.shift <= _SHIFT and motion.margin <= reach_of(extent):
            break
        # So wide a view bends the paths of a large blur until no ground truth is centred on all: take a longer lens.
        focal *= 1.5
    assert motion.shift <= _SHIFT
    assert motion.margin <= reach_of(extent)
    details = {"focal_length": focal, "principal_x": float(principal[0]), "principal_y": float(principal[1])}
    return motion, {**details, "correlation_length": length, "poses": len(motion.weights)}


def rotation_of(
    angles: np.ndarray, focal: float, principal: np.ndarray, size: int, extent: float, tolerance: float = 1e-4
) -> Rotation:
    """The rotation with axis-angle path ∝ angles [T, 3] (x, y, z), uniform in time, scaled to an extent in px.

    focal: px; principal [2] (column, row) from the crop's first pixel; size: the crop's side.
    The poses are composed with one homography so that every pixel's light comes, on average over the exposure, from
    the pixel itself: a brightness ramp is left as it was, and the ground truth is the unmoved photograph.
    """
    angles = angles - angles.mean(axis=0)
    grid = _grid(size)
    # Small-angle guess, then Newton-like correction of the scale; the extent is nearly proportional to it.
    scale = 1e-3
    scale *= extent / max(_extents(_poses(angles * scale, focal, principal), grid).mean(), 1e-12)
    count = None
    for _ in range(12):
        poses = _POSES if extent <= 160 else _LARGE_POSES
        homographies, weights, count = _even_poses(angles * scale, focal, principal, grid, count, poses)
        homographies = _recentred(homographies, weights, grid)
        extents = _extents(homographies, grid)
        if abs(extents.mean() / extent - 1) < tolerance:
            break
        scale *= extent / extents.mean()
    middle = (size - 1) / 2
    travelled = _apply(homographies, np.array([[middle, middle]]))[:, 0] - middle
    corners = np.array([[0, 0], [0, size - 1], [size - 1, 0], [size - 1, size - 1]], float)
    reach = _apply(homographies, corners)
    margin = math.ceil(max(-reach.min(), reach.max() - (size - 1), 0.0)) + 1
    kernel = _weighted_kernel(-travelled[:, ::-1], weights)
    shift = float(np.abs(np.tensordot(weights, _apply(homographies, grid), axes=1) - grid).max())
    return Rotation(homographies, weights, kernel, margin, float(extents.mean()), float(extents.max()), shift)


def rotate_blur(window: np.ndarray, motion: Rotation) -> np.ndarray:
    """Average of the poses: window [S + 2m, S + 2m, 3] float32 linear light, m = motion.margin → [S, S, 3]."""
    size = window.shape[0] - 2 * motion.margin
    result = np.zeros((size, size, window.shape[2]), np.float32)
    shift = np.array([[1, 0, motion.margin], [0, 1, motion.margin], [0, 0, 1]], float)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    pose = np.empty_like(result)
    for homography, weight in zip(motion.homographies, motion.weights, strict=True):
        cv2.warpPerspective(window, shift @ homography, (size, size), pose, flags, cv2.BORDER_REPLICATE)
        cv2.scaleAdd(pose, float(weight), result, result)
    return result


def _grid(size: int) -> np.ndarray:
    at = np.linspace(0, max(size - 1, 15), 5)  # a grid of some width even for a crop of one px
    return np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2)


def _poses(angles: np.ndarray, focal: float, principal: np.ndarray) -> np.ndarray:
    """K R(w) K⁻¹ for axis-angle vectors w [T, 3] → [T, 3, 3]."""
    theta = np.linalg.norm(angles, axis=1)[:, None, None]
    x, y, z = angles.T
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=1).reshape(-1, 3, 3)
    # Rodrigues; sinc keeps the limit at θ = 0.
    rotations = np.eye(3) + np.sinc(theta / np.pi) * cross + 0.5 * np.sinc(theta / (2 * np.pi)) ** 2 * (cross @ cross)
    camera = np.array([[focal, 0, principal[0]], [0, focal, principal[1]], [0, 0, 1]])
    return camera @ rotations @ np.linalg.inv(camera)


def _apply(homographies: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points [P, 2] through homographies [T, 3, 3] → [T, P, 2]."""
    mapped = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ homographies.transpose(0, 2, 1)
    return mapped[..., :2] / mapped[..., 2:]


def _extents(homographies: np.ndarray, grid: np.ndarray) -> np.ndarray:
    return np.ptp(_apply(homographies, grid), axis=0).max(axis=1)


def _even_poses(
    angles: np.ndarray,
    focal: float,
    principal: np.ndarray,
    grid: np.ndarray,
    count: int | None,
    poses: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, int]:
    """Poses evenly spaced along the fastest point's path, weighted by the time spent around each."""
    steps = np.linalg.norm(np.diff(_apply(_poses(angles, focal, principal), grid), axis=0), axis=2).max(axis=1)
    travelled = np.concatenate([[0.0], np.cumsum(np.maximum(steps, 1e-12))])
    if count is None:
        count = int(np.clip(math.ceil(travelled[-1] / _STEP), *poses))
    time = np.linspace(0.0, 1.0, len(travelled))
    edges = np.interp(np.linspace(0, travelled[-1], count + 1), travelled, time)
    middles = np.interp((np.arange(count) + 0.5) * travelled[-1] / count, travelled, time)
    chosen = np.stack([np.interp(middles, time, angles[:, axis]) for axis in range(3)], axis=1)
    return _poses(chosen, focal, principal), np.diff(edges), count


def _recentred(homographies: np.ndarray, weights: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The poses after one common homography that makes the mean over the exposure of every pixel's place the pixel."""
    for _ in range(2):
        mean = np.tensordot(weights, _apply(homographies, grid), axes=1)
        back, _ = cv2.findHomography(mean, grid, 0)
        homographies = homographies @ back
    return homographies


def _weighted_kernel(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    # Poses are unequal in time; the kernel's path is uniform in it, so the points are laid out by time first.
    time = np.cumsum(weights) - weights / 2
    even = np.linspace(time[0], time[-1], 257)
    return kernel_of_path(np.stack([np.interp(even, time, points[:, axis]) for axis in range(2)], axis=1))
