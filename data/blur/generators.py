"""Drawing a blur: from the config's shares and ranges to a kernel, a camera rotation or moving layers."""

import math
from dataclasses import dataclass, replace

import numpy as np

from data.blur import paths, trajectory
from data.blur.config import BlurConfig, MotionConfig
from data.blur.defocus import disc_kernel, out_of_focus
from data.blur.kernel import IDENTITY, kernel_of_path
from data.blur.layers import Layers, blob_mask, plane_mask, share_moved
from data.blur.photometry import Photometry, choose, draw_photometry
from data.blur.rolling import Rolling, draw_rolling
from data.blur.rotation import Frame, Rotation, draw_rotation
from data.blur.severity import tier_bounds

# Shares of path generators for what moves inside `layers`, and for its background.
_LAYER_PATHS = {"gaussian_process": 0.5, "linear": 0.2, "arc": 0.15, "accelerated": 0.15}
_STRAIGHT_PATHS = {"gaussian_process": 0.1, "linear": 0.35, "arc": 0.25, "accelerated": 0.3}
# Generators whose blur differs over the picture: their pairs' kernel is that of one place.
VARYING = ("rotation", "rolling_shutter", "layers", "parallax")

_LONGEST_TREMOR = 1 / 30  # s: shorter exposures than this hold no tremor to speak of


@dataclass(frozen=True)
class Recipe:
    """Everything drawn for one attempt at a pair, before any pixel is touched.

    motion: a kernel [k, k] float32 for uniform blur, or a Rotation, a Rolling, or Layers; kernel: the blur that stands
    for it (at the crop's centre, or of the foremost object); margin: px that it needs around the crop.
    """

    tier: str
    generator: str
    extent: float
    motion: np.ndarray | Rotation | Rolling | Layers
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
    moves = config.motion
    if generator == "rotation":
        rotation, details = draw_rotation(rng, extent, frame, correlation=moves.correlation)
        details["extent_max"] = rotation.extent_max
        return Recipe(tier, generator, extent, rotation, rotation.kernel, rotation.margin, photometry, details)
    if generator == "rolling_shutter":
        times = {"exposure": moves.exposure, "readout": moves.readout, "tremor_hz": moves.tremor_hz}
        rolling, details = draw_rolling(rng, extent, frame, **times)
        return Recipe(tier, generator, extent, rolling, rolling.kernel, rolling.margin, photometry, details)
    if generator in ("layers", "parallax"):
        draw = draw_layers if generator == "layers" else draw_parallax
        layers, extents, details = draw(rng, extent, frame, moves, *([masks] if generator == "layers" else []))
        details["share"] = share_moved(layers, extents, low if tier == "mild" else tier_bounds(tier)[0])
        return Recipe(tier, generator, extent, layers, layers.kernels[-1], layers.margin, photometry, details)
    if generator == "defocus":
        kernel, details = disc_kernel(extent / 2), {}
    else:
        path, details = draw_path(rng, generator, moves)
        kernel = kernel_of_path(trajectory.scale_to_extent(path, extent))
        details |= {"turning": paths.turning_of(path)}
        if config.defocus.share > 0 and rng.random() < config.defocus.share:
            details["defocus_radius"] = rng.uniform(*config.defocus.radius)
            kernel = out_of_focus(kernel, details["defocus_radius"])
    return Recipe(tier, generator, extent, kernel, kernel, len(kernel) // 2, photometry, details)


def draw_path(rng: np.random.Generator, generator: str, moves: MotionConfig) -> tuple[np.ndarray, dict[str, float]]:
    """A random path [N, 2] of a path generator, of any scale, and the parameters it was drawn with."""
    angle = rng.uniform(0.0, 2.0 * math.pi)
    if generator == "gaussian_process":
        length, anisotropy = rng.uniform(*moves.correlation), rng.uniform(0.3, 1.0)
        path = trajectory.gaussian_process_path(rng, length, anisotropy, angle)
        return path, {"correlation_length": length, "anisotropy": anisotropy, "angle": angle}
    if generator == "boracchi_foi":
        anxiety = 10.0 ** rng.uniform(*(math.log10(value) for value in moves.anxiety))
        return paths.boracchi_foi_path(rng, anxiety), {"anxiety": anxiety}
    if generator == "linear":
        return paths.linear_path(angle), {"angle": angle}
    if generator == "tremor":
        first, last = max(moves.exposure[0], _LONGEST_TREMOR), max(moves.exposure[1], _LONGEST_TREMOR)
        seconds = math.exp(rng.uniform(math.log(first), math.log(last)))
        cycles = rng.uniform(*moves.tremor_hz) * seconds
        amplitude = rng.uniform(*moves.tremor) / max(1.0, cycles)
        path = paths.tremor_path(angle, cycles, amplitude, tuple(rng.uniform(0, 2 * math.pi, 2)))
        return path, {"angle": angle, "exposure": seconds, "cycles": cycles, "amplitude": amplitude}
    if generator == "settling":
        decay, cycles, bend = rng.uniform(0.1, 0.4), rng.uniform(0.3, 1.5), rng.uniform(0.0, 0.4)
        return paths.settling_path(angle, decay, cycles, bend), {"angle": angle, "decay": decay, "cycles": cycles}
    acceleration = rng.uniform(-1.0, 1.0)
    if generator == "accelerated":
        return paths.accelerated_path(angle, acceleration), {"angle": angle, "acceleration": acceleration}
    assert generator == "arc", generator
    turn = rng.uniform(*map(math.radians, moves.arc))
    return paths.arc_path(angle, turn, acceleration), {"angle": angle, "turn": turn, "acceleration": acceleration}


def draw_layers(
    rng: np.random.Generator, extent: float, frame: Frame, moves: MotionConfig, masks: GivenMasks | None = None
) -> tuple[Layers, list[float], dict[str, float]]:
    """One to three moving objects: the foremost by `extent` px, the others by .3–1 of it, the background by up to half;
    the layers, their extents (the background's first), and what was drawn.

    Three in ten backgrounds stand still. Given masks are used as they are, the last one foremost.
    """
    objects = int(rng.integers(1, 4)) if masks is None else len(masks.opacities)
    still = rng.random() < 0.3
    extents = [0.0 if still else extent * rng.uniform(0.1, 0.5)]
    extents += [extent * rng.uniform(0.3, 1.0) for _ in range(objects - 1)] + [extent]
    kernels = tuple(_path_kernel(rng, e, moves) for e in extents)
    margin = max(len(kernel) // 2 for kernel in kernels)
    side = frame.size + 2 * margin
    if masks is None:
        drawn = np.stack([blob_mask(rng, side, frame.size) for _ in range(objects)])
    else:
        drawn = masks.window(frame.size, margin)
    layers = Layers(kernels, drawn, margin, _elsewhere(rng, side))
    return layers, extents, {"objects": objects, "background_extent": extents[0]}


def draw_parallax(
    rng: np.random.Generator, extent: float, frame: Frame, moves: MotionConfig
) -> tuple[Layers, list[float], dict[str, float]]:
    """A near plane before a far one: the same path, the far one by .2–.7 of it. As `draw_layers`."""
    path, _ = draw_path(rng, choose(rng, _STRAIGHT_PATHS), moves)
    far = extent * rng.uniform(0.2, 0.7)
    kernels = tuple(kernel_of_path(trajectory.scale_to_extent(path, e)) for e in (far, extent))
    margin = max(len(kernel) // 2 for kernel in kernels)
    side = frame.size + 2 * margin
    layers = Layers(kernels, plane_mask(rng, side, frame.size)[None], margin, _elsewhere(rng, side))
    return layers, [far, extent], {"far_extent": far}


def _elsewhere(rng: np.random.Generator, side: int) -> tuple[int, int]:
    return int(rng.integers(side // 3, side - side // 3)), int(rng.integers(side // 3, side - side // 3))


def _path_kernel(rng: np.random.Generator, extent: float, moves: MotionConfig) -> np.ndarray:
    path, _ = draw_path(rng, choose(rng, _STRAIGHT_PATHS if moves.straight_layers else _LAYER_PATHS), moves)
    return kernel_of_path(trajectory.scale_to_extent(path, extent)) if extent > 0 else IDENTITY
