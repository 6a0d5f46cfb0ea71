"""One training pair: a crop of a sharp photograph and the blurry photograph a moving camera would have taken of it."""

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from data.blur import photometry as camera
from data.blur.attempt import (
    Attempt,
    PairPlan,
    attempts_of,
    draw_attempt,
    lamps_behind,
    plan_pair,
    psnr_miss,
    sharp_crop,
)
from data.blur.config import BlurConfig
from data.blur.kernel import convolve_planes
from data.blur.layers import Layers, layers_blur
from data.blur.photometry import Photometry
from data.blur.rolling import Rolling, rolling_blur
from data.blur.rotation import Rotation, rotate_blur
from data.blur.severity import PSNR_CAP
from data.image import psnr


@dataclass
class BlurPair:
    """A blurry crop and its sharp ground truth, both [S, S, 3] uint8 RGB.

    kernel [k, k] float32, None where it is not known; meta: plain JSON-able values, among them tier, extent (px),
    generator, input_psnr (dB), psnr_in_tier, attempts, padded (px of the margin that had to be reflected) and seed, by
    which `plan_pair` plans the pair again.
    """

    blurry: np.ndarray
    sharp: np.ndarray
    kernel: np.ndarray | None
    meta: dict[str, Any] = field(default_factory=dict)


def synthesize_pair(
    photo: np.ndarray,
    box: tuple[int, int, int],
    rng: np.random.Generator,
    config: BlurConfig,
    *,
    tier: str | None = None,
    flip: bool = False,
    masks: np.ndarray | None = None,
) -> BlurPair:
    """Blur one crop of a sharp photograph; `rng` decides everything, see `data.blur.rng.sample_rng`.

    photo [H, W, 3] uint8 RGB; box (top, left, size) px inside it; tier forces a severity tier or "identity"; flip
    mirrors the crop left to right; masks [L, H, W] uint8 are the opacities of objects that the `layers` generator moves
    instead of procedural ones. The ground truth is the photograph's own crop, to the bit. The margin that the blur
    needs is read from the photograph around the box, reflected only where the photograph ends.
    When the input PSNR falls outside the tier's range the blur is drawn again, at most `config.max_attempts` times; if
    none fits, the nearest is kept and meta["psnr_in_tier"] is false (a crop of plain sky never loses much).
    Raises ValueError for a photo of another kind, a box outside it, or an unknown tier.
    """
    return pair_of_plan(plan_pair(photo, box, rng.bytes(16).hex(), config, tier=tier, flip=flip, masks=masks))


def pair_of_plan(plan: PairPlan) -> BlurPair:
    """The pair of a plan, made on the CPU."""
    sharp = sharp_crop(plan)
    best = None
    for number in range(attempts_of(plan)):
        attempt = draw_attempt(plan, number)
        blurry = render(attempt)
        quality = min(psnr(blurry, sharp), PSNR_CAP)
        best = better(best, Result(attempt, quality, psnr_miss(quality, plan), blurry))
        if best.miss == 0:
            break
    assert best is not None
    return BlurPair(best.blurry, sharp, best.attempt.recipe.kernel, pair_meta(plan, best, number + 1))


@dataclass(frozen=True)
class Result:
    """An attempt rendered: its input PSNR in dB, by how much that misses the tier's range, and the blurry crop."""

    attempt: Attempt
    quality: float
    miss: float
    blurry: Any


def better(first: Result | None, second: Result) -> Result:
    """The result nearer to its tier's range; the earlier one if both are equally near."""
    return first if first is not None and first.miss <= second.miss else second


def pair_meta(plan: PairPlan, result: Result, attempts: int) -> dict[str, Any]:
    """What is recorded with a pair, plain JSON-able values."""
    recipe = result.attempt.recipe
    return {
        "tier": plan.tier,
        "extent": recipe.extent,
        "generator": recipe.generator,
        "input_psnr": result.quality,
        "psnr_in_tier": result.miss == 0,
        "attempts": attempts,
        "attempt": result.attempt.number,
        "padded": result.attempt.padded,
        "kernel_size": len(recipe.kernel),
        "flip": plan.flip,
        "box": list(plan.photo_box),
        "seed": plan.seed,
        **recipe.details,
        **{name: getattr(recipe.photometry, name) for name in Photometry.__dataclass_fields__},
    }


def render(attempt: Attempt) -> np.ndarray:
    """The blurry crop [S, S, 3] uint8 of an attempt."""
    return camera.finish(blurred_light(attempt), attempt.recipe.photometry, attempt.noise)


def blurred_light(attempt: Attempt) -> list[np.ndarray]:
    """Linear light that reaches the sensor, clipped once to its white, before noise: planes R, G, B [S, S] float32."""
    motion, photometry = attempt.recipe.motion, attempt.recipe.photometry
    curve = photometry.response
    boost, trail = photometry.highlight_boost, photometry.trail
    planes = camera.scene_light(attempt.window, curve, boost, trail, attempt.lamps)
    if isinstance(motion, Rotation):
        planes = cv2.split(rotate_blur(cv2.merge(planes), motion))
    elif isinstance(motion, Rolling):
        planes = cv2.split(rolling_blur(cv2.merge(planes), motion))
    elif isinstance(motion, Layers):
        assert attempt.background is not None
        background = camera.scene_light(attempt.background, curve, boost, trail, lamps_behind(attempt))
        planes = layers_blur(planes, background, motion)
    else:
        planes = convolve_planes(planes, motion)
    white = camera.white_of(attempt.window, curve)
    return [np.clip(plane, np.float32(0), level) for plane, level in zip(planes, white, strict=True)]
