"""One training pair: a crop of a sharp photograph and the blurry photograph a moving camera would have taken of it."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np

from data.blur import paths, trajectory
from data.blur import photometry as camera
from data.blur.config import BlurConfig
from data.blur.kernel import IDENTITY, convolve_valid, kernel_of_path
from data.blur.photometry import Photometry, draw_photometry
from data.blur.rng import stream
from data.blur.severity import PSNR_CAP, TIERS, psnr, tier_bounds

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


@dataclass(frozen=True)
class Recipe:
    """Everything drawn for one attempt at a pair, before any pixel is touched."""

    tier: str
    generator: str
    extent: float
    kernel: np.ndarray
    photometry: Photometry
    details: dict[str, float]


def synthesize_pair(
    photo: np.ndarray,
    box: tuple[int, int, int],
    rng: np.random.Generator,
    config: BlurConfig,
    *,
    tier: str | None = None,
    flip: bool = False,
) -> BlurPair:
    """Blur one crop of a sharp photograph; `rng` decides everything, see `data.blur.rng.sample_rng`.

    photo [H, W, 3] uint8 RGB; box (top, left, size) px inside it; tier forces a severity tier or "identity"; flip
    mirrors the crop left to right. The ground truth is the photograph's own crop, to the bit. The margin that the blur
    needs is read from the photograph around the box, reflected only where the photograph ends.
    When the input PSNR falls outside the tier's range the blur is drawn again, at most `config.max_attempts` times; if
    none fits, the nearest is kept and meta["psnr_in_tier"] is false (a crop of plain sky never loses much).
    Raises ValueError for a photo of another kind, a box outside it, or an unknown tier.
    """
    return pair_from_seed(photo, box, rng.bytes(16).hex(), config, tier=tier, flip=flip)


def pair_from_seed(
    photo: np.ndarray,
    box: tuple[int, int, int],
    seed: str,
    config: BlurConfig,
    *,
    tier: str | None = None,
    flip: bool = False,
) -> BlurPair:
    """The pair whose meta["seed"] is `seed` (32 hex digits), made again from the same photo, box and config."""
    top, left, size = check_photo_and_box(photo, box)
    key = _seed_bytes(seed)
    tier = draw_tier(key, config) if tier is None else tier
    if tier not in TIERS:
        raise ValueError(f"tier {tier!r}: must be one of {', '.join(TIERS)}")
    sharp = photo[top : top + size, left : left + size]
    sharp = cv2.flip(sharp, 1) if flip else sharp.copy()
    best: tuple[float, float, int, Recipe, np.ndarray, int] | None = None
    attempts = 0
    for attempt in range(1 if tier == "identity" else config.max_attempts):
        attempts += 1
        recipe = draw_recipe(stream(key, attempt, _RECIPE), tier, config)
        window, padded = source_window(photo, (top, left, size), len(recipe.kernel) // 2, flip)
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


def draw_recipe(rng: np.random.Generator, tier: str, config: BlurConfig) -> Recipe:
    """Blur and camera of one attempt, drawn from the config for a tier."""
    photometry = draw_photometry(rng, config.photometry)
    if tier == "identity":
        # No light is moved, so boosting highlights would only brighten them: identity is noise and JPEG alone.
        return Recipe(tier, "identity", 0.0, IDENTITY, replace(photometry, highlight_boost=0.0), {})
    low, high = getattr(config.tiers, tier).extent
    extent = float(np.clip(math.exp(rng.uniform(math.log(low), math.log(high))), low, high))
    extent = min(extent, math.nextafter(tier_bounds(tier)[1], 0.0))  # half open: its end is the next tier's
    generator = camera.choose(rng, config.generators.model_dump())
    path, details = draw_path(rng, generator)
    kernel = kernel_of_path(trajectory.scale_to_extent(path, extent))
    return Recipe(tier, generator, extent, kernel, photometry, details)


def draw_path(rng: np.random.Generator, generator: str) -> tuple[np.ndarray, dict[str, float]]:
    """A random path [N, 2] of a generator, of any scale, and the parameters it was drawn with."""
    angle = rng.uniform(0.0, 2.0 * math.pi)
    if generator == "gaussian_process":
        length, anisotropy = rng.uniform(0.15, 0.8), rng.uniform(0.3, 1.0)
        path = trajectory.gaussian_process_path(rng, length, anisotropy, angle)
        return path, {"correlation_length": length, "anisotropy": anisotropy, "angle": angle}
    if generator == "boracchi_foi":
        anxiety = 10.0 ** rng.uniform(-2.0, 0.0)
        return paths.boracchi_foi_path(rng, anxiety), {"anxiety": anxiety}
    if generator == "linear":
        return paths.linear_path(angle), {"angle": angle}
    acceleration = rng.uniform(-1.0, 1.0)
    if generator == "accelerated":
        return paths.accelerated_path(angle, acceleration), {"angle": angle, "acceleration": acceleration}
    assert generator == "arc", generator
    turn = rng.uniform(math.pi / 6, math.pi)
    return paths.arc_path(angle, turn, acceleration), {"angle": angle, "turn": turn, "acceleration": acceleration}


def render(window: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """The blurry crop [S, S, 3] uint8 of a window [S + k − 1, S + k − 1, 3] uint8; `rng` draws the noise."""
    curve = camera.response_curve(recipe.photometry.curve, recipe.photometry.curve_parameter)
    light = camera.decode(window, curve)
    camera.boost_highlights(light, window, recipe.photometry.highlight_boost)
    light = convolve_valid(light, recipe.kernel)
    return camera.finish(light, camera.white_of(window, curve), recipe.photometry, rng)


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


def _seed_bytes(seed: str) -> bytes:
    try:
        key = bytes.fromhex(seed)
    except (TypeError, ValueError):
        key = b""
    if len(key) != 16:
        raise ValueError(f"seed {seed!r}: must be 32 hex digits, as in a pair's meta['seed']")
    return key
