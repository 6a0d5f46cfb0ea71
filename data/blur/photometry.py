"""What a camera does to light: response curves, highlights, clipping, sensor noise, quantisation, JPEG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import cv2
import numpy as np

from data.blur import isp
from data.blur.config import PhotometryConfig

# The display value (code/255) from which the brightest channel of a pixel counts as a highlight.
HIGHLIGHT_FROM = 0.92

# px of a clipped spot that has all of a trail's gain.
SPOT = 40

# Forward curves are tabulated over sqrt(linear light): every curve is gentle there, so that one entry moves the result
# by less than .03 of a code even in deep shadow.
_ENTRIES = 16384


@dataclass(frozen=True)
class Photometry:
    """Photometric parameters of one pair, as drawn; all plain numbers."""

    curve: str = "srgb"
    curve_parameter: float = 0.0
    highlight_boost: float = 0.0
    red_gain: float = 1.0
    blue_gain: float = 1.0
    shot: float = 0.0
    read: float = 0.0
    jpeg_quality: int | None = None
    trail: float = 0.0
    denoise: float | None = None
    sharpen: float = 0.0
    halo: float = 1.0

    @property
    def gains(self) -> tuple[float, float, float]:
        """White-balance gains of R, G, B."""
        return self.red_gain, 1.0, self.blue_gain

    @property
    def response(self) -> "ResponseCurve":
        """The camera's response."""
        return response_curve(self.curve, self.curve_parameter)


@dataclass(frozen=True)
class ResponseCurve:
    """A camera response and its inverse. to_linear [256] float32: linear light of a code; to_code: see `encode`;
    to_value: the same before rounding, float32."""

    to_linear: np.ndarray
    to_code: np.ndarray
    to_value: np.ndarray


def draw_photometry(rng: np.random.Generator, config: PhotometryConfig) -> Photometry:
    """Photometric parameters of one pair drawn from the config's ranges."""
    shares = config.curves.model_dump()
    curve = choose(rng, shares)
    ranges = {"gamma": config.gamma, "exponential": config.exponential, "s_curve": config.s_curve}
    parameter = rng.uniform(*ranges.get(curve, (0.0, 0.0)))
    boost = rng.uniform(*config.highlight_boost)
    phone = rng.random() < config.noise.phone_share
    low, high = config.noise.phone_scale if phone else config.noise.scale
    scale = math.exp(rng.uniform(math.log(low), math.log(high))) if phone else rng.uniform(low, high)
    red, blue = rng.uniform(*config.red_gain), rng.uniform(*config.blue_gain)
    with_jpeg = rng.random() < config.jpeg.probability
    quality = int(rng.integers(config.jpeg.quality[0], config.jpeg.quality[1] + 1))
    trails, phone_isp = config.trails, config.isp
    trail = 0.0
    if trails.share > 0 and rng.random() < trails.share:
        trail = math.exp(rng.uniform(math.log(trails.gain[0]), math.log(trails.gain[1])))
    processed: dict = {}
    if phone_isp.share > 0 and rng.random() < phone_isp.share:
        processed = {"denoise": rng.uniform(*phone_isp.denoise), "sharpen": rng.uniform(*phone_isp.sharpen)}
        processed["halo"] = rng.uniform(*phone_isp.radius)
        with_jpeg, quality = True, int(rng.integers(phone_isp.quality[0], phone_isp.quality[1] + 1))
    return Photometry(
        curve=curve,
        curve_parameter=parameter,
        highlight_boost=boost,
        red_gain=red,
        blue_gain=blue,
        # The scale is of the noise's deviation: its shot variance grows with the square.
        shot=config.noise.shot * scale**2,
        read=config.noise.read * scale,
        jpeg_quality=quality if with_jpeg else None,
        trail=trail,
        **processed,
    )


def response(curve: str, parameter: float, linear: np.ndarray) -> np.ndarray:
    """Camera response in [0, 1] of linear light in [0, 1], float64; increasing, 0 → 0, 1 → 1.

    srgb: IEC 61966-2-1; gamma: x^(1/γ); exponential: (1 − e^(−ax))/(1 − e^(−a)); s_curve: sRGB with a toe and a
    shoulder, (1 − c)·v + c·v²(3 − 2v) of the sRGB value v.
    """
    x = np.asarray(linear, np.float64)
    if curve == "gamma":
        return x ** (1.0 / parameter)
    if curve == "exponential":
        return np.expm1(-parameter * x) / math.expm1(-parameter)
    v = np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.maximum(x, 1e-12) ** (1 / 2.4) - 0.055)
    if curve == "srgb":
        return v
    if curve == "s_curve":
        return (1 - parameter) * v + parameter * v * v * (3 - 2 * v)
    raise ValueError(f"response curve {curve!r}: must be srgb, gamma, exponential or s_curve")


def inverse_response(curve: str, parameter: float, value: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] of a response in [0, 1], float64: the inverse of `response`."""
    v = np.asarray(value, np.float64)
    if curve == "gamma":
        return v**parameter
    if curve == "exponential":
        return np.log1p(v * math.expm1(-parameter)) / -parameter
    if curve == "s_curve":
        # The cubic's root by bisection, on 256 values: exact to double precision, and always increasing.
        low, high = np.zeros_like(v), np.ones_like(v)
        for _ in range(52):
            middle = (low + high) / 2
            below = (1 - parameter) * middle + parameter * middle * middle * (3 - 2 * middle) < v
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        v = np.where(v <= 0, 0.0, np.where(v >= 1, 1.0, (low + high) / 2))
    elif curve != "srgb":
        raise ValueError(f"response curve {curve!r}: must be srgb, gamma, exponential or s_curve")
    return np.where(v <= 12.92 * 0.0031308, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


@lru_cache(maxsize=128)
def response_curve(curve: str, parameter: float = 0.0) -> ResponseCurve:
    """Tables of a response curve; `decode` and `encode` of one curve give back every code exactly."""
    codes = inverse_response(curve, parameter, np.arange(256) / 255.0)
    roots = np.arange(_ENTRIES + 1) / _ENTRIES
    values = 255.0 * response(curve, parameter, roots * roots)
    return ResponseCurve(codes.astype(np.float32), np.rint(values).astype(np.uint8), values.astype(np.float32))


def decode(codes: np.ndarray, curve: ResponseCurve) -> np.ndarray:
    """Linear light float32 of uint8 codes, same shape."""
    return cv2.LUT(codes, curve.to_linear).reshape(codes.shape)


def encode(linear: np.ndarray, curve: ResponseCurve) -> np.ndarray:
    """uint8 codes of float32 linear light, same shape; below 0 and above 1 saturate. The one quantisation there is."""
    return curve.to_code.take(_entries(linear))


def _entries(linear: np.ndarray) -> np.ndarray:
    """Places in a forward curve's table."""
    root = np.sqrt(np.clip(linear, np.float32(0), np.float32(1)))
    return (root * np.float32(_ENTRIES) + np.float32(0.5)).astype(np.uint16)


def spots(codes: np.ndarray) -> np.ndarray | None:
    """How much of a trail's gain a pixel of codes [H, W, 3] uint8 has, [H, W] float32 in [0, 1]; None where none has.

    1 in clipped spots of up to `SPOT` px, less in larger ones (SPOT / area): a lamp is many times brighter than white,
    a white sky hardly.
    """
    red, green, blue = cv2.split(codes)
    _, clipped = cv2.threshold(cv2.max(cv2.max(red, green), blue), 249, 1, cv2.THRESH_BINARY)
    left, top, width, height = cv2.boundingRect(clipped)
    if width == 0:
        return None
    inner = np.s_[top : top + height, left : left + width]
    count, labels, facts, _ = cv2.connectedComponentsWithStats(clipped[inner], connectivity=8, ltype=cv2.CV_32S)
    shares = np.zeros(count, np.float32)
    shares[1:] = np.minimum(1.0, SPOT / facts[1:, cv2.CC_STAT_AREA])
    result = np.zeros(clipped.shape, np.float32)
    result[inner] = shares.take(labels)
    return result


def scene_light(
    codes: np.ndarray, curve: ResponseCurve, boost: float, trail: float = 0.0, lamps: np.ndarray | None = None
) -> list[np.ndarray]:
    """Scene light of a photograph, as planes R, G, B [H, W] float32, from its codes [H, W, 3] uint8.

    Pixels near white get back the light that clipping took: L·(1 + boost·m), where m rises smoothly from 0 to 1 as the
    brightest channel's display value goes from .92 to 1. lamps [H, W] (`spots`) get `trail` times white on top.
    Planes, because each then stays in a core's cache.
    """
    channels = cv2.split(codes)
    planes = [cv2.LUT(channel, curve.to_linear).reshape(channel.shape) for channel in channels]
    lit = trail > 0 and lamps is not None
    if boost <= 0 and not lit:
        return planes
    brightest = cv2.max(cv2.max(channels[0], channels[1]), channels[2])
    if brightest.max() <= int(HIGHLIGHT_FROM * 255):
        return planes
    gain = cv2.LUT(brightest, 1 + np.float32(boost) * highlight_table())
    if lit:
        gain = gain + np.float32(trail) * lamps
    return [plane * gain for plane in planes]


@lru_cache(maxsize=1)
def highlight_table() -> np.ndarray:
    """Highlight weight m of every code of the brightest channel, [256] float32."""
    t = np.clip((np.arange(256) / 255.0 - HIGHLIGHT_FROM) / (1.0 - HIGHLIGHT_FROM), 0.0, 1.0)
    return (t * t * (3 - 2 * t)).astype(np.float32)


def white_of(codes: np.ndarray, curve: ResponseCurve) -> np.ndarray:
    """White level [3] float32 of a photograph: its brightest linear light per channel, where the sensor clips.

    Blur cannot make a picture brighter than its brightest point, so a plain grey wall stays exactly as grey.
    """
    brightest = cv2.reduce(cv2.reduce(codes, 0, cv2.REDUCE_MAX), 1, cv2.REDUCE_MAX)
    return curve.to_linear[brightest.reshape(-1)]


def add_sensor_noise(plane: np.ndarray, gain: float, photometry: Photometry, noise: np.ndarray) -> np.ndarray:
    """Shot and read noise of a sensor behind a white-balance gain: light and noise indices [H, W] → light float32.

    On the sensor x = L/gain the deviation is √(shot·x + read²); the gain then multiplies light and noise alike.
    """
    if photometry.shot <= 0 and photometry.read <= 0:
        return plane
    variance = plane * np.float32(photometry.shot * gain) + np.float32((photometry.read * gain) ** 2)
    return plane + normal_quantiles().take(noise) * np.sqrt(variance)


def noise_indices(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers of normal quantiles, uint16: `normal_quantiles()[indices]` are normal deviates.

    65536 equally likely quantiles, up to 4.2 deviations: four times faster than exact deviates, and the same on any
    device.
    """
    count = math.prod(shape)
    return rng.bit_generator.random_raw(-(-count // 4)).view(np.uint16)[:count].reshape(shape)


@lru_cache(maxsize=1)
def normal_quantiles() -> np.ndarray:
    """The 65536 mid-quantiles of the normal distribution, [65536] float32, variance 1."""
    inverse = NormalDist().inv_cdf
    upper = np.array([inverse((i + 0.5) / 65536) for i in range(32768, 65536)])
    upper /= math.sqrt(np.mean(upper**2))
    return np.concatenate([-upper[::-1], upper]).astype(np.float32)


def jpeg(codes: np.ndarray, quality: int) -> np.ndarray:
    """A picture [H, W, 3] uint8 RGB after baseline JPEG, 4:2:0, at a quality of 1–100."""
    written, data = cv2.imencode(".jpg", cv2.cvtColor(codes, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert written
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def finish(planes: Sequence[np.ndarray], photometry: Photometry, noise: np.ndarray) -> np.ndarray:
    """The blurry photograph [H, W, 3] uint8 of clipped light, planes [H, W] float32: noise, response, a phone's
    processing (where drawn), 8 bits, JPEG."""
    noisy = (
        add_sensor_noise(plane, gain, photometry, some)
        for plane, gain, some in zip(planes, photometry.gains, noise, strict=True)
    )
    if photometry.denoise is not None:
        developed = isp.develop(list(noisy), photometry.denoise, photometry.shot, photometry.read)
        values = cv2.merge([photometry.response.to_value.take(_entries(plane)) for plane in developed])
        values = isp.sharpen(values, photometry.sharpen, photometry.halo)
        codes = np.clip(values + np.float32(0.5), 0, 255).astype(np.uint8)
    else:
        codes = cv2.merge([encode(plane, photometry.response) for plane in noisy])
    return codes if photometry.jpeg_quality is None else jpeg(codes, photometry.jpeg_quality)


def choose(rng: np.random.Generator, shares: dict[str, float]) -> str:
    """One of the names, with probability proportional to its share."""
    names = [name for name, share in shares.items() if share > 0]
    edges = np.cumsum([shares[name] for name in names])
    return names[int(np.searchsorted(edges, rng.random() * edges[-1], side="right").clip(0, len(names) - 1))]
