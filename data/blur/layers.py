"""Moving layers: one to three objects that move on their own before a background that moves differently."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from data.blur.kernel import convolve_planes

_TEXTURE = 20.0  # codes by which borrowed texture may vary


@dataclass(frozen=True)
class Layers:
    """Objects before a background; each has its own kernel.

    kernels: the background's first, then one an object, nearest last. masks [L, S + 2m, S + 2m] uint8: an object's
    opacity at rest, m = margin px. elsewhere (rows, columns): where the texture behind the objects is taken from.
    """

    kernels: tuple[np.ndarray, ...]
    masks: np.ndarray
    margin: int
    elsewhere: tuple[int, int]


def blob_mask(rng: np.random.Generator, side: int, crop: int) -> np.ndarray:
    """Opacity [side, side] uint8 of a random object, soft at its edge, with its middle in the central crop.

    A star-shaped outline of a few harmonics, stretched and turned, of 8–40 % of the crop's area before stretching.
    """
    around = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    radius = np.ones_like(around)
    for harmonic in range(2, 7):
        radius += rng.uniform(0, 0.5 / harmonic) * np.cos(harmonic * around + rng.uniform(0, 2 * math.pi))
    radius *= crop * math.sqrt(rng.uniform(0.08, 0.40) / math.pi)
    stretch, angle = rng.uniform(0.6, 1.0), rng.uniform(0, 2 * math.pi)
    x, y = radius * np.cos(around) / stretch, radius * np.sin(around) * stretch
    first = (side - crop) / 2
    column, row = first + crop * rng.uniform(0.2, 0.8, 2)
    outline = np.stack(
        [column + x * math.cos(angle) - y * math.sin(angle), row + x * math.sin(angle) + y * math.cos(angle)], axis=1
    )
    mask = np.zeros((side, side), np.uint8)
    cv2.fillPoly(mask, [np.rint(outline * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return cv2.GaussianBlur(mask, (5, 5), 0.8)


def background_of(window: np.ndarray, masks: np.ndarray, elsewhere: tuple[int, int]) -> np.ndarray:
    """The scene behind the objects: window [H, W, 3] uint8 with what the masks [L, H, W] cover painted over.

    What an object hides shows when it moves. Were it the object itself, its blur would carry a sharp ghost; so its
    tone continues the surroundings and its texture comes from elsewhere in the window.
    """
    covered = masks.max(axis=0)
    # Grown a little, so that an object's own edge does not colour what is spread from the surroundings.
    seen = 1 - cv2.dilate(covered, np.ones((7, 7), np.uint8)).astype(np.float32) / 255
    # Painted only where an object is opaque: objects at rest before this background give the photograph, exactly.
    painted = covered == 255
    # Tone is smooth: found at a quarter of the resolution.
    height, width = covered.shape
    quarter = (max(width // 4, 1), max(height // 4, 1))
    few = cv2.resize(seen, quarter, interpolation=cv2.INTER_AREA)
    light = window.astype(np.float32)
    tone = _spread(cv2.resize(cv2.multiply(light, cv2.merge([seen] * 3)), quarter, interpolation=cv2.INTER_AREA), few)
    # Only fine grey texture is borrowed: whole edges from elsewhere would appear as objects that nobody moved.
    grey = cv2.cvtColor(window, cv2.COLOR_RGB2GRAY).astype(np.float32)
    # Mirrored at the window's edge, not carried on from the other one, which would leave a seam.
    moved = grey[_mirrored(height, elsewhere[0])][:, _mirrored(width, elsewhere[1])]
    coarse = cv2.resize(_smooth(moved, quarter), (width, height), interpolation=cv2.INTER_LINEAR)
    texture = np.clip(moved - coarse, -_TEXTURE, _TEXTURE)
    paint = cv2.resize(tone, (width, height), interpolation=cv2.INTER_LINEAR) + cv2.merge([texture] * 3)
    return np.where(painted[..., None], np.clip(paint + 0.5, 0, 255).astype(np.uint8), window)


def layers_blur(planes: Sequence[np.ndarray], background: Sequence[np.ndarray], motion: Layers) -> list[np.ndarray]:
    """Blurred scene, planes [S, S], of the light and the background, planes [S + 2m, S + 2m] float32 linear light.

    Colour is weighted by opacity before it is blurred, so no object takes in a rim of what lies around it.
    """
    scene = convolve_planes(_trimmed(background, motion.margin, motion.kernels[0]), motion.kernels[0])
    for mask, kernel in zip(motion.masks, motion.kernels[1:], strict=True):
        opacity = mask.astype(np.float32) / np.float32(255)
        weighted = [plane * opacity for plane in planes]
        *colour, cover = convolve_planes(_trimmed([*weighted, opacity], motion.margin, kernel), kernel)
        clear = 1 - cover
        scene = [behind * clear + before for behind, before in zip(scene, colour, strict=True)]
    return scene


def _trimmed(planes: Sequence[np.ndarray], margin: int, kernel: np.ndarray) -> list[np.ndarray]:
    """Planes [S + 2·margin, …] without the part of the margin that this kernel does not reach."""
    spare = margin - len(kernel) // 2
    return [plane[spare : plane.shape[0] - spare, spare : plane.shape[1] - spare] for plane in planes]


def _mirrored(length: int, shift: int) -> np.ndarray:
    """Places 0 … length − 1 moved by `shift` and mirrored at the ends."""
    period = max(2 * (length - 1), 1)
    place = (np.arange(length) - shift) % period
    return np.minimum(place, period - place)


def plane_mask(rng: np.random.Generator, side: int, crop: int) -> np.ndarray:
    """Opacity [side, side] uint8 of a near plane: what lies below a gently waving line through the central crop."""
    angle, waves, phase = rng.uniform(-0.6, 0.6), rng.uniform(0.5, 2.5), rng.uniform(0, 2 * math.pi)
    height, level = crop * rng.uniform(0.02, 0.12), side / 2 + crop * rng.uniform(-0.2, 0.2)
    at = np.arange(side, dtype=np.float32)
    line = level + np.tan(angle) * (at - side / 2) + height * np.sin(2 * math.pi * waves * at / side + phase)
    mask = np.clip(at[:, None] - line[None, :] + 0.5, 0, 1)
    return cv2.GaussianBlur((255 * mask).astype(np.uint8), (5, 5), 0.8)


def share_moved(layers: Layers, extents: Sequence[float], least: float) -> float:
    """Share of the crop whose foremost layer moves by `least` px or more; extents as the kernels: the background's
    first."""
    inner = slice(layers.margin, layers.masks.shape[1] - layers.margin)
    moved = np.full(layers.masks[0, inner, inner].shape, float(extents[0] >= least), np.float32)
    for mask, extent in zip(layers.masks, extents[1:], strict=True):
        opacity = mask[inner, inner].astype(np.float32) / 255
        moved = moved * (1 - opacity) + opacity * float(extent >= least)
    return float(moved.mean())


def _spread(weighted: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Known colours spread over the unknown: at every pixel from the finest scale at which some are near.

    weighted [H, W, 3]: colour times weight; weight [H, W] in [0, 1] → [H, W, 3].
    """
    height, width = weight.shape
    if min(height, width) <= 2:
        return np.zeros_like(weighted) + weighted.sum((0, 1)) / max(float(weight.sum()), 1e-6)
    half = ((width + 1) // 2, (height + 1) // 2)
    coarse = _spread(
        cv2.resize(weighted, half, interpolation=cv2.INTER_AREA), cv2.resize(weight, half, interpolation=cv2.INTER_AREA)
    )
    coarse = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return weighted + coarse * (1 - weight[..., None])


def _smooth(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A low-pass of about 16 px of the image, given at a quarter of its resolution."""
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.GaussianBlur(small, (0, 0), 4.0, borderType=cv2.BORDER_REFLECT_101)
