"""Drawing a blur: from the config's shares and ranges to a kernel, a camera rotation or moving layers."""

import math
from dataclasses import dataclass, replace

import numpy as np

from data.blur import paths, trajectory
from data.blur.config import BlurConfig
from data.blur.kernel import IDENTITY, kernel_of_path
from data.blur.layers import Layers, blob_mask
from data.blur.photometry import Photometry, choose, draw_photometry
from data.blur.rotation import Frame, Rotation, draw_rotation
from data.blur.severity import tier_bounds

# Shares of path generators for what moves inside `layers`, and for its background.
_LAYER_PATHS = {"gaussian_process": 0.5, "linear": 0.2, "arc": 0.15, "accelerated": 0.15}


@dataclass(frozen=True)
class Recipe:
    """Everything drawn for one attempt at a pair, before any pixel is touched.

    motion: a kernel [k, k] float32 for uniform blur, or a Rotation, or Layers; kernel: the blur that stands for it (at
    the crop's centre, or of the foremost object); margin: px that it needs around the crop.
    """

    tier: str
    generator: str
    extent: float
    motion: np.ndarray | Rotation | Layers
    kernel: np.ndarray
    margin: int
    photometry: Photometry
    details: dict[str, float]


@dataclass(frozen=True)
class GivenMasks:
    """Opacities [L, h, w] uint8 of objects around a crop whose first pixel lies at (top, left)."""

    opacities: np.ndarray
    top: int
    left: int

    def window(self, size: int, margin: int) -> np.ndarray:
        """Opacities [L, size + 2·margin, …] around the crop; nothing beyond the given part belongs to an object."""
        padded = np.pad(self.opacities, ((0, 0), (margin, margin), (margin, margin)))
        side = size + 2 * margin
        return np.ascontiguousarray(padded[:, self.top : self.top + side, self.left : self.left + side])


def draw_recipe(
    rng: np.random.Generator, tier: str, config: BlurConfig, frame: Frame, masks: GivenMasks | None = None
) -> Recipe:
    """Blur and camera of one attempt for a tier; masks replace the procedural objects of `layers`."""
    photometry = draw_photometry(rng, config.photometry)
    if tier == "identity":
        # No light is moved, so boosting highlights would only brighten them: identity is noise and JPEG alone.
        still = replace(photometry, highlight_boost=0.0)
        return Recipe(tier, "identity", 0.0, IDENTITY, IDENTITY, 0, still, {})
    low, high = getattr(config.tiers, tier).extent
    extent = float(np.clip(math.exp(rng.uniform(math.log(low), math.log(high))), low, high))
    extent = min(extent, math.nextafter(tier_bounds(tier)[1], 0.0))  # half open: its end is the next tier's
    generator = choose(rng, config.generators.model_dump())
    if generator == "rotation":
        rotation, details = draw_rotation(rng, extent, frame)
        details["extent_max"] = rotation.extent_max
        return Recipe(tier, generator, extent, rotation, rotation.kernel, rotation.margin, photometry, details)
    if generator == "layers":
        layers, details = draw_layers(rng, extent, frame, masks)
        return Recipe(tier, generator, extent, layers, layers.kernels[-1], layers.margin, photometry, details)
    path, details = draw_path(rng, generator)
    kernel = kernel_of_path(trajectory.scale_to_extent(path, extent))
    return Recipe(tier, generator, extent, kernel, kernel, len(kernel) // 2, photometry, details)


def draw_path(rng: np.random.Generator, generator: str) -> tuple[np.ndarray, dict[str, float]]:
    """A random path [N, 2] of a path generator, of any scale, and the parameters it was drawn with."""
    angle = rng.uniform(0.0, 2.0 * math.pi)
    if generator == "gaussian_process":
        length, anisotropy = rng.uniform(0.15, 0.8), rng.uniform(0.3, 1.0)
        path = trajectory.gaussian_process_path(rng, length, anisotropy, angle)
        return path, {"correlation_length": length, "anisotropy": anisotropy, "angle": angle}
    if generator == "boracchi_foi":
        anxiety = 10.0 ** rng.uniform(-2.5, -1.0)
        return paths.boracchi_foi_path(rng, anxiety), {"anxiety": anxiety}
    if generator == "linear":
        return paths.linear_path(angle), {"angle": angle}
    acceleration = rng.uniform(-1.0, 1.0)
    if generator == "accelerated":
        return paths.accelerated_path(angle, acceleration), {"angle": angle, "acceleration": acceleration}
    assert generator == "arc", generator
    turn = rng.uniform(math.pi / 6, math.pi)
    return paths.arc_path(angle, turn, acceleration), {"angle": angle, "turn": turn, "acceleration": acceleration}


def draw_layers(
    rng: np.random.Generator, extent: float, frame: Frame, masks: GivenMasks | None = None
) -> tuple[Layers, dict[str, float]]:
    """One to three moving objects: the foremost by `extent` px, the others by .3–1 of it, the background by up to half.

    Three in ten backgrounds stand still. Given masks are used as they are, the last one foremost.
    """
    objects = int(rng.integers(1, 4)) if masks is None else len(masks.opacities)
    still = rng.random() < 0.3
    extents = [0.0 if still else extent * rng.uniform(0.1, 0.5)]
    extents += [extent * rng.uniform(0.3, 1.0) for _ in range(objects - 1)] + [extent]
    kernels = tuple(_path_kernel(rng, e) for e in extents)
    margin = max(len(kernel) // 2 for kernel in kernels)
    side = frame.size + 2 * margin
    if masks is None:
        drawn = np.stack([blob_mask(rng, side, frame.size) for _ in range(objects)])
    else:
        drawn = masks.window(frame.size, margin)
    elsewhere = (int(rng.integers(side // 3, side - side // 3)), int(rng.integers(side // 3, side - side // 3)))
    return Layers(kernels, drawn, margin, elsewhere), {"objects": objects, "background_extent": extents[0]}


def _path_kernel(rng: np.random.Generator, extent: float) -> np.ndarray:
    path, _ = draw_path(rng, choose(rng, _LAYER_PATHS))
    return kernel_of_path(trajectory.scale_to_extent(path, extent)) if extent > 0 else IDENTITY
