"""Typed settings of blur synthesis, with presets; the `blur:` section of a training config."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from data.blur.presets import PRESETS
from data.blur.severity import LARGEST_EXTENT, TIER_EDGES, tier_bounds


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if not all(math.isfinite(v) for v in value) or value[0] > value[1]:
        raise ValueError(f"range {list(value)}: give two finite numbers, the lower one first")
    return value


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Range = Annotated[tuple[float, float], AfterValidator(_ordered)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class _Shares(_Section):
    @model_validator(mode="after")
    def _sum_to_one(self):
        total = sum(self.model_dump().values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"shares sum to {total:g}: make them sum to 1")
        return self


class TierConfig(_Section):
    """One severity tier."""

    share: Share
    """Fraction of all samples."""
    extent: Range
    """Extents drawn, px at training resolution, log-uniform; must lie in the tier's fixed bounds."""
    psnr: Range
    """Input PSNR, dB, outside of which the blur is drawn again."""


class IdentityConfig(_Section):
    """Pairs without blur: they teach the network to leave a sharp photograph alone."""

    share: Share = 0.04
    """Fraction of all samples."""


class TiersConfig(_Section):
    """Severity tiers and their shares, which sum to 1."""

    identity: IdentityConfig = IdentityConfig()
    """No blur: the sharp crop with only noise and JPEG."""
    mild: TierConfig = TierConfig(share=0.06, extent=(2, 15), psnr=(18, 45))
    """Extents under 15 px."""
    moderate: TierConfig = TierConfig(share=0.25, extent=(15, 30), psnr=(14, 34))
    """Extents of 15–30 px."""
    severe: TierConfig = TierConfig(share=0.45, extent=(30, 80), psnr=(12, 32))
    """Extents of 30–80 px."""
    extreme: TierConfig = TierConfig(share=0.20, extent=(80, 160), psnr=(9, 30))
    """Extents from 80 px; use crops of 384 px or more."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Let one key of a tier be written without its others."""
        if not isinstance(given, dict):
            return given
        defaults = {name: cls.model_fields[name].default.model_dump() for name in TIER_EDGES}
        return {k: _merged(defaults[k], v) if k in defaults and isinstance(v, dict) else v for k, v in given.items()}

    @model_validator(mode="after")
    def _consistent(self):
        total = self.identity.share + sum(getattr(self, tier).share for tier in TIER_EDGES)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the tiers' shares, identity included, sum to {total:g}: make them sum to 1")
        for tier in TIER_EDGES:
            low, high = tier_bounds(tier)
            first, last = getattr(self, tier).extent
            if last > LARGEST_EXTENT:
                raise ValueError(f"{tier}.extent {last:g} px: {LARGEST_EXTENT:g} px at most")
            if first < low or last > high or first <= 0:
                raise ValueError(
                    f"{tier}.extent [{first:g}, {last:g}] px leaves the tier's bounds of {low:g}–{high:g} px"
                    " (above 0): give the blur to the tier it belongs to"
                )
        return self


class GeneratorsConfig(_Shares):
    """Shares of the blur generators, which sum to 1; one that is not listed has none."""

    gaussian_process: Share = 0.0
    """Smooth camera shake: Gaussian process with Matérn 5/2 covariance."""
    boracchi_foi: Share = 0.0
    """Jittery hand shake of Boracchi and Foi (2012)."""
    linear: Share = 0.0
    """Straight motion of constant speed."""
    arc: Share = 0.0
    """Motion along an arc of a circle."""
    accelerated: Share = 0.0
    """Straight motion of changing speed."""
    tremor: Share = 0.0
    """A drift with the tremor of a hand on it."""
    settling: Share = 0.0
    """A knock that dies down."""
    rotation: Share = 0.0
    """Camera rotation by homographies: the blur varies over the crop."""
    rolling_shutter: Share = 0.0
    """A gyroscope-like path, of which every row sees a piece of its own."""
    layers: Share = 0.0
    """One to three objects that move before a background."""
    parallax: Share = 0.0
    """A near plane that moves more than the far one behind it."""
    defocus: Share = 0.0
    """A disc instead of a path."""


class MotionConfig(_Section):
    """How cameras move: ranges of what the generators draw."""

    anxiety: Range = (10**-2.5, 0.1)
    """Of boracchi_foi, log-uniform: how much the heading shakes."""
    correlation: Range = (0.15, 0.8)
    """Correlation length of gaussian_process (and of rotation), in exposures: short ones are curly."""
    arc: Range = (30.0, 180.0)
    """Degrees by which an arc turns."""
    tremor_hz: Range = (8.0, 12.0)
    """Frequency of a hand's tremor."""
    tremor: Range = (0.02, 0.2)
    """Its amplitude relative to the drift, in an exposure of one cycle."""
    exposure: Range = (1 / 250, 1 / 2)
    """Exposure of tremor (from 1/30) and rolling_shutter, s, log-uniform."""
    readout: Range = (0.01, 0.03)
    """Of rolling_shutter: time between the first row and the last, s."""
    straight_layers: bool = False
    """Objects and backgrounds of layers move on straight and gently bent paths, as walking people and cars do."""

    @model_validator(mode="after")
    def _possible(self):
        for name in type(self).model_fields:
            value = getattr(self, name)
            if not isinstance(value, bool) and value[0] <= 0:
                raise ValueError(f"{name} {list(value)}: must be above 0")
        if self.correlation[1] > 10 or self.arc[1] > 720:
            raise ValueError(
                "correlation reaches to 10 exposures, arc to 720°: beyond that a path only gets straighter"
            )
        return self


class DefocusConfig(_Section):
    """A lens that is not quite in focus while the camera moves."""

    share: Share = 0.0
    """Fraction of the pairs of path generators."""
    radius: Range = (0.7, 3.0)
    """Radius of the disc, px, uniform."""

    @model_validator(mode="after")
    def _possible(self):
        if not 0 < self.radius[0] <= self.radius[1] <= 32:
            raise ValueError(f"radius {list(self.radius)}: must lie above 0 and at most at 32")
        return self


class TrailsConfig(_Section):
    """Lamps and glints: small spots so bright that the sensor clips them, and that draw the path when it moves."""

    share: Share = 0.0
    """Fraction of samples."""
    gain: Range = (4.0, 63.0)
    """Light given back to a clipped spot, times white, log-uniform; less to larger spots."""

    @model_validator(mode="after")
    def _possible(self):
        if not 0 < self.gain[0] <= self.gain[1] <= 1000:
            raise ValueError(f"gain {list(self.gain)}: must lie above 0 and at most at 1000")
        return self


class IspConfig(_Section):
    """What a phone does between the sensor and the JPEG: demosaic, denoise, sharpen."""

    share: Share = 0.0
    """Fraction of samples."""
    denoise: Range = (0.0, 2.0)
    """Deviations of noise that the filter believes in."""
    sharpen: Range = (0.2, 1.2)
    """Amount of the sharpening."""
    radius: Range = (0.7, 1.6)
    """Deviation of its halo, px."""
    quality: tuple[Annotated[int, Field(ge=1, le=100)], Annotated[int, Field(ge=1, le=100)]] = (75, 95)
    """Quality of the phone's JPEG, which such a sample always has."""

    @model_validator(mode="after")
    def _possible(self):
        _ordered(self.quality)
        if min(self.denoise[0], self.sharpen[0]) < 0 or not 0 < self.radius[0] <= self.radius[1] <= 2:
            raise ValueError("denoise and sharpen must not be negative, radius must lie in 0–2")
        return self


class CurvesConfig(_Shares):
    """Shares of the camera responses between linear light and 8-bit codes, which sum to 1; unlisted ones have none."""

    srgb: Share = 0.0
    """The sRGB curve."""
    gamma: Share = 0.0
    """Power law, exponent from `gamma`."""
    exponential: Share = 0.0
    """1 − e^(−ax), a from `exponential`."""
    s_curve: Share = 0.0
    """sRGB with toe and shoulder, contrast from `s_curve`."""


class NoiseConfig(_Section):
    """Shot and read noise of the sensor: deviation √(shot·x + read²) at linear light x."""

    shot: float = Field(1e-4, ge=0, le=0.1)
    """β₁, variance per unit of light (RSBlur's camera: 1e-4; RealBlur's: 8.89e-5)."""
    read: float = Field(9.15e-4, ge=0, le=0.1)
    """β₂, deviation in the dark (RSBlur's camera: 9.15e-4; RealBlur's: 2.94e-5)."""
    scale: Range = (0.5, 1.5)
    """Uniform factor on the deviation."""
    phone_share: Share = 0.15
    """Fraction of samples with a small sensor's noise."""
    phone_scale: Range = (1.5, 5.0)
    """Log-uniform factor on the deviation for those."""

    @model_validator(mode="after")
    def _positive(self):
        if self.scale[0] < 0 or self.phone_scale[0] <= 0:
            raise ValueError("scale must not be negative, and phone_scale must be above 0")
        return self


class JpegConfig(_Section):
    """JPEG of the blurry picture; the sharp one is never compressed."""

    probability: Share = 0.6
    """Fraction of samples."""
    quality: tuple[Annotated[int, Field(ge=1, le=100)], Annotated[int, Field(ge=1, le=100)]] = (60, 98)
    """Uniform, both ends included."""

    @model_validator(mode="after")
    def _positive(self):
        _ordered(self.quality)
        return self


class PhotometryConfig(_Section):
    """What the camera does to light, in order: response, highlights, (blur), clip, noise, response, 8 bits, JPEG."""

    curves: CurvesConfig = CurvesConfig(srgb=0.7, gamma=0.1, exponential=0.1, s_curve=0.1)
    """Camera responses."""
    gamma: Range = (1.8, 2.6)
    """Exponents of the power law."""
    exponential: Range = (1.0, 3.0)
    """a of 1 − e^(−ax)."""
    s_curve: Range = (0.1, 0.6)
    """Contrast of the S-curve."""
    highlight_boost: Range = (0.0, 4.0)
    """Light given back to highlights: up to 1 + boost times white. [0, 0] turns it off."""
    red_gain: Range = (1.4, 2.4)
    """White-balance gain of red: the sensor's noise grows by it."""
    blue_gain: Range = (1.3, 2.2)
    """White-balance gain of blue."""
    noise: NoiseConfig = NoiseConfig()
    """Sensor noise."""
    jpeg: JpegConfig = JpegConfig()
    """Compression."""
    trails: TrailsConfig = TrailsConfig()
    """Lamps and glints."""
    isp: IspConfig = IspConfig()
    """A phone's processing."""

    @model_validator(mode="after")
    def _sensible(self):
        limits = {
            "gamma": (1.0, 4.0),
            "exponential": (1e-3, 10.0),
            "s_curve": (0.0, 0.9),
            "highlight_boost": (0.0, 100.0),
            "red_gain": (1.0, 8.0),
            "blue_gain": (1.0, 8.0),
        }
        for name, (low, high) in limits.items():
            first, last = getattr(self, name)
            if first < low or last > high:
                raise ValueError(f"{name} [{first:g}, {last:g}]: must lie in {low:g}–{high:g}")
        return self


class BlurConfig(_Section):
    """How blurry pictures are made from sharp ones. A preset gives every value; keys written out override it."""

    preset: Literal["camera", "severe", "realistic-rsblur", "gopro-like", "mild"] = "camera"
    """The set of defaults to start from."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where pairs are made: "cpu" in the loading workers, "cuda" in batches on the training GPU."""
    tiers: TiersConfig = TiersConfig()
    """Severity tiers."""
    generators: GeneratorsConfig = GeneratorsConfig(
        gaussian_process=0.52, boracchi_foi=0.10, linear=0.06, arc=0.06, accelerated=0.06, rotation=0.10, layers=0.10
    )
    """Blur generators."""
    motion: MotionConfig = MotionConfig()
    """How cameras move."""
    defocus: DefocusConfig = DefocusConfig()
    """Defocus on top of a motion."""
    photometry: PhotometryConfig = PhotometryConfig()
    """Camera."""
    max_attempts: int = Field(4, ge=1, le=64)
    """Blurs drawn for a pair until its input PSNR lies in its tier's range; the nearest one is kept if none does."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("preset", cls.model_fields["preset"].default)
        # An unknown name is left for the field's own check to refuse.
        return _merged(PRESETS[name], given) if isinstance(name, str) and name in PRESETS else given


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` put on top, section by section."""
    result = dict(base)
    for key, value in over.items():
        # Shares are one decision: a list of them replaces the preset's, it does not mix with it.
        both = isinstance(value, dict) and isinstance(result.get(key), dict) and key not in ("generators", "curves")
        result[key] = _merged(result[key], value) if both else value
    return result
