"""One training pair: a crop of a sharp photograph and the blurry photograph a moving camera would have taken of it."""

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from data.blur import photometry as camera
from data.blur.config import BlurConfig
from data.blur.generators import Recipe, draw_recipe
from data.blur.kernel import convolve_valid
from data.blur.layers import Layers, background_of, layers_blur
from data.blur.photometry import Photometry
from data.blur.rng import stream
from data.blur.rotation import Frame, Rotation, rotate_blur
from data.blur.severity import PSNR_CAP, TIERS, psnr

_RECIPE, _NOISE = 0, 1  # purposes of the random streams under a pair's seed


@dataclass
class BlurPair:
    """A blurry crop and its sharp ground truth, both [S, S, 3] uint8 RGB.

    kernel [k, k] float32; meta: plain JSON-able values, among them tier, extent (px), generator, input_psnr (dB),
    psnr_in_tier, attempts, padded (px of the margin that had to be reflected) and seed (see `pair_from_seed`).
    """

    blurry: np.ndarray
    sharp: np.ndarray
    kernel: np.ndarray
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
    return pair_from_seed(photo, box, rng.bytes(16).hex(), config, tier=tier, flip=flip, masks=masks)


def pair_from_seed(
    photo: np.ndarray,
    box: tuple[int, int, int],
    seed: str,
    config: BlurConfig,
    *,
    tier: str | None = None,
    flip: bool = False,
    masks: np.ndarray | None = None,
) -> BlurPair:
    """The pair whose meta["seed"] is `seed` (32 hex digits), made again from the same photo, box and config."""
    top, left, size = check_photo_and_box(photo, box)
    key = _seed_bytes(seed)
    tier = draw_tier(key, config) if tier is None else tier
    if tier not in TIERS:
        raise ValueError(f"tier {tier!r}: must be one of {', '.join(TIERS)}")
    sharp = photo[top : top + size, left : left + size]
    sharp = cv2.flip(sharp, 1) if flip else sharp.copy()
    height, width = photo.shape[:2]
    # Everything is drawn as the flipped photo shows it.
    frame = Frame(height, width, top, width - left - size if flip else left, size)
    masks = _checked_masks(masks, photo, flip)
    best: tuple[float, float, int, Recipe, np.ndarray, int] | None = None
    attempts = 0
    for attempt in range(1 if tier == "identity" else config.max_attempts):
        attempts += 1
        recipe = draw_recipe(stream(key, attempt, _RECIPE), tier, config, frame, masks)
        window, padded = source_window(photo, (top, left, size), recipe.margin, flip)
        blurry = render(window, recipe, stream(key, attempt, _NOISE))
        quality = min(psnr(blurry, sharp), PSNR_CAP)
        miss = psnr_miss(quality, tier, config)
        if best is None or miss < best[0]:
            best = (miss, quality, attempt, recipe, blurry, padded)
        if miss == 0:
            break
    assert best is not None
    miss, quality, kept, recipe, blurry, padded = best
    meta = {
        "tier": tier,
        "extent": recipe.extent,
        "generator": recipe.generator,
        "input_psnr": quality,
        "psnr_in_tier": miss == 0,
        "attempts": attempts,
        "attempt": kept,
        "padded": padded,
        "kernel_size": len(recipe.kernel),
        "flip": bool(flip),
        "box": [top, left, size],
        "seed": seed,
        **recipe.details,
        **{name: getattr(recipe.photometry, name) for name in Photometry.__dataclass_fields__},
    }
    return BlurPair(blurry, sharp, recipe.kernel, meta)


def draw_tier(key: bytes, config: BlurConfig) -> str:
    """Severity tier of the pair with this seed, by the config's shares."""
    shares = {tier: getattr(config.tiers, tier).share for tier in TIERS}
    return camera.choose(stream(key, 0, 2), shares)


def render(window: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """The blurry crop [S, S, 3] uint8 of a window [S + 2m, S + 2m, 3] uint8, m = recipe.margin; `rng` draws noise."""
    photometry = recipe.photometry
    curve = camera.response_curve(photometry.curve, photometry.curve_parameter)
    light = _scene_light(window, photometry, curve)
    if isinstance(recipe.motion, Rotation):
        light = rotate_blur(light, recipe.motion)
    elif isinstance(recipe.motion, Layers):
        behind = background_of(window, recipe.motion.masks, recipe.motion.elsewhere)
        light = layers_blur(light, _scene_light(behind, photometry, curve), recipe.motion)
    else:
        light = convolve_valid(light, recipe.motion)
    return camera.finish(light, camera.white_of(window, curve), photometry, rng)


def _scene_light(codes: np.ndarray, photometry: Photometry, curve: camera.ResponseCurve) -> np.ndarray:
    return camera.boost_highlights(camera.decode(codes, curve), codes, photometry.highlight_boost)


def source_window(photo: np.ndarray, box: tuple[int, int, int], margin: int, flip: bool) -> tuple[np.ndarray, int]:
    """The box with `margin` px around it [S + 2m, S + 2m, 3], and the most px that had to be reflected at a side."""
    top, left, size = box
    height, width = photo.shape[:2]
    first_row, first_column = max(top - margin, 0), max(left - margin, 0)
    window = photo[first_row : top + size + margin, first_column : left + size + margin]
    before = first_row - (top - margin), first_column - (left - margin)
    after = max(top + size + margin - height, 0), max(left + size + margin - width, 0)
    padded = max(*before, *after)
    if padded:
        window = cv2.copyMakeBorder(window, before[0], after[0], before[1], after[1], cv2.BORDER_REFLECT_101)
    return (cv2.flip(window, 1) if flip else np.ascontiguousarray(window)), padded


def psnr_miss(value: float, tier: str, config: BlurConfig) -> float:
    """By how many dB an input PSNR lies outside its tier's range; 0 inside, and always 0 for identity."""
    if tier == "identity":
        return 0.0
    low, high = getattr(config.tiers, tier).psnr
    return max(low - value, value - high, 0.0)


def check_photo_and_box(photo: np.ndarray, box: tuple[int, int, int]) -> tuple[int, int, int]:
    """(top, left, size) as ints; ValueError unless photo is [H, W, 3] uint8 and the box lies inside it."""
    if not isinstance(photo, np.ndarray) or photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        what = f"{photo.dtype} {photo.shape}" if isinstance(photo, np.ndarray) else type(photo).__name__
        raise ValueError(f"photo is {what}: give RGB uint8 [H, W, 3]")
    top, left, size = (int(v) for v in box)
    height, width = photo.shape[:2]
    if size < 1 or top < 0 or left < 0 or top + size > height or left + size > width:
        raise ValueError(
            f"box (top {top}, left {left}, size {size}) does not lie in the photo of {height}×{width} px:"
            " choose a smaller crop or drop the photo"
        )
    return top, left, size


def _checked_masks(masks: np.ndarray | None, photo: np.ndarray, flip: bool) -> np.ndarray | None:
    if masks is None:
        return None
    masks = np.asarray(masks)
    if masks.dtype != np.uint8 or masks.ndim != 3 or len(masks) < 1 or masks.shape[1:] != photo.shape[:2]:
        raise ValueError(
            f"masks are {masks.dtype} {masks.shape}: give uint8 opacities [L, H, W] of the photo's"
            f" {photo.shape[0]}×{photo.shape[1]} px"
        )
    return masks[:, :, ::-1] if flip else masks


def _seed_bytes(seed: str) -> bytes:
    try:
        key = bytes.fromhex(seed)
    except (TypeError, ValueError):
        key = b""
    if len(key) != 16:
        raise ValueError(f"seed {seed!r}: must be 32 hex digits, as in a pair's meta['seed']")
    return key
