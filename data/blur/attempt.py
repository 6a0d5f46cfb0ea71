"""A pair before its pixels: its plan, and the attempts at it, which any device can then render."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from data.blur import photometry as camera
from data.blur.config import BlurConfig
from data.blur.generators import GivenMasks, Recipe, draw_recipe
from data.blur.layers import Layers, background_of
from data.blur.rng import stream
from data.blur.rotation import Frame, reach_of
from data.blur.severity import TIERS

MIN_CROP = 8  # px: less than the smallest blur is no picture
_RECIPE, _NOISE, _TIER = 0, 1, 2  # purposes of the random streams under a pair's seed


@dataclass(frozen=True)
class PairPlan:
    """All that decides a pair, small enough to send to another process.

    region [h, w, 3] uint8: the part of the photo that any of its blurs can reach, not flipped; box: the crop in it;
    frame: the crop in the photo, as flipped; seed: 32 hex digits; masks: the `layers` generator's objects or None.
    """

    region: np.ndarray
    box: tuple[int, int, int]
    frame: Frame
    photo_box: tuple[int, int, int]
    tier: str
    flip: bool
    seed: str
    config: BlurConfig
    masks: GivenMasks | None


@dataclass(frozen=True)
class Attempt:
    """One drawn blur of a plan and the pixels it needs.

    window [S + 2m, S + 2m, 3] uint8, m = recipe.margin; background: the same without the moving objects, or None;
    noise [3, S, S] uint16: quantile numbers for `photometry.normal_quantiles`; padded: most px reflected at a side;
    lamps [S + 2m, S + 2m] float32: `photometry.spots` of the window, where trails were drawn and there are any.
    """

    number: int
    recipe: Recipe
    window: np.ndarray
    background: np.ndarray | None
    noise: np.ndarray
    padded: int
    lamps: np.ndarray | None = None


def plan_pair(
    photo: np.ndarray,
    box: tuple[int, int, int],
    seed: str,
    config: BlurConfig,
    *,
    tier: str | None = None,
    flip: bool = False,
    masks: np.ndarray | None = None,
) -> PairPlan:
    """The plan of a pair; arguments and errors as `data.blur.synthesize_pair`, with the seed in place of an rng."""
    top, left, size = _checked_box(photo, box)
    key = _seed_bytes(seed)
    if tier is None:
        shares = {name: getattr(config.tiers, name).share for name in TIERS}
        tier = camera.choose(stream(key, 0, _TIER), shares)
    if tier not in TIERS:
        raise ValueError(f"tier {tier!r}: must be one of {', '.join(TIERS)}")
    height, width = photo.shape[:2]
    reach = 0 if tier == "identity" else reach_of(getattr(config.tiers, tier).extent[1])
    if reach and config.defocus.share > 0:
        reach += math.ceil(config.defocus.radius[1])
    rows = slice(max(top - reach, 0), min(top + size + reach, height))
    columns = slice(max(left - reach, 0), min(left + size + reach, width))
    inner = (top - rows.start, left - columns.start, size)
    given = None
    if masks is not None:
        part = _checked_masks(masks, photo)[:, rows, columns]
        given = GivenMasks(part[:, :, ::-1] if flip else part, inner[0], _flipped(inner[1], size, part.shape[2], flip))
    frame = Frame(height, width, top, _flipped(left, size, width, flip), size)
    return PairPlan(photo[rows, columns], inner, frame, (top, left, size), tier, bool(flip), seed, config, given)


def draw_attempt(plan: PairPlan, number: int) -> Attempt:
    """Attempt `number` at a plan: the same whoever asks, and whichever attempts were drawn before."""
    key = _seed_bytes(plan.seed)
    recipe = draw_recipe(stream(key, number, _RECIPE), plan.tier, plan.config, plan.frame, plan.masks)
    window, padded = _source_window(plan.region, plan.box, recipe.margin, plan.flip)
    background = None
    if isinstance(recipe.motion, Layers):
        background = background_of(window, recipe.motion.masks, recipe.motion.elsewhere)
    noise = camera.noise_indices(stream(key, number, _NOISE), (3, plan.frame.size, plan.frame.size))
    lamps = camera.spots(window) if recipe.photometry.trail > 0 else None
    return Attempt(number, recipe, window, background, noise, padded, lamps)


def lamps_behind(attempt: Attempt) -> np.ndarray | None:
    """The lamps of an attempt's background: those that no object covers."""
    if attempt.lamps is None or not isinstance(attempt.recipe.motion, Layers):
        return None
    return np.where(attempt.recipe.motion.masks.max(axis=0) == 255, np.float32(0), attempt.lamps)


def sharp_crop(plan: PairPlan) -> np.ndarray:
    """The ground truth [S, S, 3] uint8: the photo's own pixels."""
    top, left, size = plan.box
    crop = plan.region[top : top + size, left : left + size]
    return cv2.flip(crop, 1) if plan.flip else crop.copy()


def psnr_miss(value: float, plan: PairPlan) -> float:
    """By how many dB an input PSNR lies outside its tier's range; 0 inside, and always 0 for identity."""
    if plan.tier == "identity":
        return 0.0
    low, high = getattr(plan.config.tiers, plan.tier).psnr
    return max(low - value, value - high, 0.0)


def attempts_of(plan: PairPlan) -> int:
    """Most attempts at a plan."""
    return 1 if plan.tier == "identity" else plan.config.max_attempts


def _source_window(region: np.ndarray, box: tuple[int, int, int], margin: int, flip: bool) -> tuple[np.ndarray, int]:
    """The box with `margin` px around it, and the most px that had to be reflected at a side."""
    top, left, size = box
    height, width = region.shape[:2]
    rows = slice(max(top - margin, 0), top + size + margin)
    columns = slice(max(left - margin, 0), left + size + margin)
    window = region[rows, columns]
    before = rows.start - (top - margin), columns.start - (left - margin)
    after = max(rows.stop - height, 0), max(columns.stop - width, 0)
    padded = max(*before, *after)
    if padded:
        window = cv2.copyMakeBorder(window, before[0], after[0], before[1], after[1], cv2.BORDER_REFLECT_101)
    return (cv2.flip(window, 1) if flip else np.ascontiguousarray(window)), padded


def _flipped(first: int, size: int, whole: int, flip: bool) -> int:
    return whole - first - size if flip else first


def _checked_box(photo: np.ndarray, box: tuple[int, int, int]) -> tuple[int, int, int]:
    if not isinstance(photo, np.ndarray) or photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        what = f"{photo.dtype} {photo.shape}" if isinstance(photo, np.ndarray) else type(photo).__name__
        raise ValueError(f"photo is {what}: give RGB uint8 [H, W, 3]")
    if len(box) != 3 or not all(math.isfinite(v) and int(v) == v for v in box):
        raise ValueError(f"box {tuple(box)}: give whole numbers (top, left, size)")
    top, left, size = (int(v) for v in box)
    height, width = photo.shape[:2]
    if size < MIN_CROP:
        raise ValueError(f"box (top {top}, left {left}, size {size}): crops are {MIN_CROP} px or more")
    if top < 0 or left < 0 or top + size > height or left + size > width:
        raise ValueError(
            f"box (top {top}, left {left}, size {size}) does not lie in the photo of {height}×{width} px:"
            " choose a smaller crop or drop the photo"
        )
    return top, left, size


def _checked_masks(masks: np.ndarray, photo: np.ndarray) -> np.ndarray:
    masks = np.asarray(masks)
    if masks.dtype != np.uint8 or masks.ndim != 3 or len(masks) < 1 or masks.shape[1:] != photo.shape[:2]:
        raise ValueError(
            f"masks are {masks.dtype} {masks.shape}: give uint8 opacities [L, H, W] of the photo's"
            f" {photo.shape[0]}×{photo.shape[1]} px"
        )
    return masks


def _seed_bytes(seed: str) -> bytes:
    try:
        key = bytes.fromhex(seed)
    except (TypeError, ValueError):
        key = b""
    if len(key) != 16:
        raise ValueError(f"seed {seed!r}: must be 32 hex digits, as in a pair's meta['seed']")
    return key
