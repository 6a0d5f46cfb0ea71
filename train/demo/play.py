"""The playground: a camera path, the blur it makes of a sharp photograph, and what models and others make of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

from data.blur import photometry as camera
from data.blur.config import BlurConfig, MotionConfig
from data.blur.generators import draw_path
from data.blur.kernel import convolve_planes, kernel_of_path
from data.blur.severity import severity_of, tier_bounds
from data.blur.trajectory import SAMPLES, extent_of, scale_to_extent
from train.evaluate.deconvolution import wiener
from train.evaluate.metrics import measured, to_uint8
from train.evaluate.yardsticks import ALL, NOISES, choose, moments

SIDE = 512  # px of the playground's photographs
EXTENTS = (4.0, 160.0)  # px that a path may span
MOST_POINTS = 5000
GENERATORS = ("gaussian_process", "boracchi_foi", "linear", "arc", "accelerated", "settling", "tremor")
METRICS = ("psnr", "ssim")
# The camera's noise at 1, as BlurConfig draws it about that; light beyond white as in the middle of its range.
SHOT, READ, BOOST = BlurConfig().photometry.noise.shot, BlurConfig().photometry.noise.read, 1.0


@dataclass(frozen=True)
class Row:
    """A picture and its scores; kind: `blurry`, `trivial` (anyone can do that), `told` (knows the kernel), `ours`."""

    name: str
    kind: str
    scores: dict[str, float]


def path_of(points: Any) -> np.ndarray:
    """Camera path [N, 2] (y, x), uniform in time, of points [[x, y, seconds], …] as the pad has them; any scale.

    Where the hand was slow, light gathers: the path is sampled evenly in time. ValueError for what is no path.
    """
    try:
        drawn = np.asarray(points, np.float64)
    except (TypeError, ValueError):
        drawn = np.empty(0)
    if drawn.ndim != 2 or drawn.shape[1] != 3 or not 2 <= len(drawn) <= MOST_POINTS or not np.isfinite(drawn).all():
        raise ValueError("draw a path first: press on the pad, move, and let go")
    seconds = np.maximum.accumulate(drawn[:, 2])
    if seconds[-1] <= seconds[0] or extent_of(drawn[:, :2]) <= 0:
        raise ValueError("this path does not move: draw a longer one")
    evenly = np.linspace(seconds[0], seconds[-1], SAMPLES + 1)
    return np.stack([np.interp(evenly, seconds, drawn[:, axis]) for axis in (1, 0)], axis=1)


def sample_path(tier: str, rng: np.random.Generator) -> tuple[list[list[float]], float]:
    """(points for the pad, extent in px) of a random camera path of a severity tier, drawn as training draws them."""
    low, high = tier_bounds(tier)
    low, high = max(low, EXTENTS[0]), min(high, EXTENTS[1])
    extent = math.exp(rng.uniform(math.log(low), math.log(high)))
    path, _ = draw_path(rng, GENERATORS[int(rng.integers(len(GENERATORS)))], MotionConfig())
    middle, size = (path.max(0) + path.min(0)) / 2, extent_of(path)
    placed = 0.5 + 0.8 * (path - middle) / size
    seconds = np.linspace(0, 1, len(path))
    points = [[float(x), float(y), float(t)] for (y, x), t in zip(placed, seconds, strict=True)]
    return points, min(float(round(extent)), math.nextafter(high, 0.0))


def blur(sharp: np.ndarray, kernel: np.ndarray, noise: float, seed: int = 0) -> np.ndarray:
    """The photograph that a moving camera would have taken: uint8 RGB [H, W, 3] of a sharp one and a kernel.

    As training makes pairs: in linear light, highlights restored, clipped, sensor noise (1: an ordinary camera's), 8
    bits. Beyond its border the photograph is mirrored.
    """
    margin = len(kernel) // 2
    window = cv2.copyMakeBorder(sharp, margin, margin, margin, margin, cv2.BORDER_REFLECT_101)
    optics = camera.Photometry(
        highlight_boost=BOOST if margin else 0.0, red_gain=1.9, blue_gain=1.7, shot=SHOT * noise**2, read=READ * noise
    )
    light = convolve_planes(camera.scene_light(window, optics.response, optics.highlight_boost), kernel)
    white = camera.white_of(window, optics.response)
    clipped = [np.clip(plane, np.float32(0), level) for plane, level in zip(light, white, strict=True)]
    quantiles = camera.noise_indices(np.random.default_rng(seed), (3, *sharp.shape[:2]))
    return camera.finish(clipped, optics, quantiles)


def kernel_of(points: Any, extent: float) -> np.ndarray:
    """The kernel of a drawn path whose larger side is `extent` px. ValueError for what is no path or extent."""
    if not EXTENTS[0] <= extent <= EXTENTS[1]:
        raise ValueError(f"extent {extent:g} px: {EXTENTS[0]:g} to {EXTENTS[1]:g}")
    return kernel_of_path(scale_to_extent(path_of(points), extent))


def scored(sharp: np.ndarray, blurry: np.ndarray, restored: np.ndarray, kernel: np.ndarray | None) -> list[Row]:
    """Scores of the blurry picture, of yardsticks made of it, and of the restored one; all uint8 RGB [H, W, 3].

    Smoothing and the unsharp mask have the settings that are best for this very picture, chosen with the sharp one in
    hand: nobody can do better with them. So has the Wiener filter, which is told the kernel too, where one is given.
    """
    truth, seen = _tensor(sharp), _tensor(blurry)
    best = choose([moments(seen, truth, ALL)])
    made = best.apply(seen, ALL)
    sigma, (radius, amount) = best.gaussian[ALL], best.unsharp[ALL]
    smoothing = f"best Gaussian smoothing, σ {sigma:g} px" if sigma else "Gaussian smoothing: none helps"
    mask = f"best unsharp mask, σ {radius:g} px, amount {amount:g}" if amount else "unsharp mask: none helps"
    rows = [("blurry, as it is", "blurry", seen)]
    rows += [(smoothing, "trivial", made["gaussian"]), (mask, "trivial", made["unsharp"])]
    if kernel is not None and len(kernel) > 1:
        light = seen.float().div(255)
        tries = [to_uint8(wiener(light, kernel, noise)) for noise in NOISES]
        quality = [row["psnr"] for row in measured(torch.stack(tries), truth.expand(len(tries), -1, -1, -1), ["psnr"])]
        rows.append(("Wiener filter, told the kernel", "told", tries[int(np.argmax(quality))]))
    rows.append(("restored by the model", "ours", _tensor(restored)))
    pictures = torch.stack([picture for _, _, picture in rows])
    scores = measured(pictures, truth.expand(len(rows), -1, -1, -1), METRICS)
    return [Row(name, kind, each) for (name, kind, _), each in zip(rows, scores, strict=True)]


def best_trivial(rows: Sequence[Row]) -> Row:
    """The best that anyone can do without a model: leaving the picture, smoothing it, or the unsharp mask."""
    return max((row for row in rows if row.kind in ("blurry", "trivial")), key=lambda row: row.scores["psnr"])


def squared(photo: np.ndarray, side: int = SIDE) -> np.ndarray:
    """The middle square of a photograph, uint8 RGB [H, W, 3], by area averaging at most `side` px wide.

    ValueError for one that is smaller than a blur would be.
    """
    height, width = photo.shape[:2]
    size = min(height, width)
    if size < EXTENTS[1] + 2:
        raise ValueError(f"{width}×{height} px: give a photograph of at least {EXTENTS[1] + 2:g} px a side")
    top, left = (height - size) // 2, (width - size) // 2
    square = np.ascontiguousarray(photo[top : top + size, left : left + size])
    return square if size <= side else cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA)


def kernel_picture(kernel: np.ndarray, side: int = 256) -> np.ndarray:
    """A kernel as uint8 [side, side] for the page: brightest where the camera stayed longest."""
    values = np.sqrt(kernel / kernel.max())  # faint parts of a streak are to be seen
    return cv2.resize((255 * values).astype(np.uint8), (side, side), interpolation=cv2.INTER_AREA)


def severity(extent: float) -> str:
    """`46 px: severe`."""
    return f"{extent:.0f} px: {severity_of(extent)}"


def _tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
