"""Rolling shutter: every row is exposed a moment after the one above it, so each has a piece of the path of its own."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from data.blur.kernel import kernel_of_path
from data.blur.rotation import Frame, reach_of
from data.blur.trajectory import gaussian_process_path

_STEP = 1.5  # px between two moments at the fastest row
_MOMENTS = (12, 480)


@dataclass(frozen=True)
class Rolling:
    """Moments of a camera that moves while its rows are read out.

    ends [N, S, 2, 2] float32: at each moment of its exposure, where the light of a row's first and last pixel comes
    from, (column, row) counted from the crop's first pixel; in between it is linear. Every row comes, on average over
    its exposure, from itself. kernel: the blur at the crop's centre; margin: px that the ends reach beyond the crop;
    extent, extent_max: over the rows' ends, px.
    """

    ends: np.ndarray
    kernel: np.ndarray
    margin: int
    extent: float
    extent_max: float


def draw_rolling(
    rng: np.random.Generator,
    extent: float,
    frame: Frame,
    *,
    exposure: tuple[float, float],
    readout: tuple[float, float],
    tremor_hz: tuple[float, float],
) -> tuple[Rolling, dict[str, float]]:
    """A random path, as a gyroscope records one, under a rolling shutter, of mean extent `extent` px.

    Drift, slow sway and a hand's tremor (Hz) of pan, tilt and roll over exposure and readout, s. The photo is taken for
    a part of a larger virtual frame, which the readout runs down.
    """
    seconds = math.exp(rng.uniform(math.log(exposure[0]), math.log(exposure[1])))
    read = rng.uniform(*readout)
    rows = frame.height * 2.0 ** rng.uniform(0.0, 1.5)
    angle, frequency, phases = rng.uniform(0, 2 * math.pi), rng.uniform(*tremor_hz), rng.uniform(0, 2 * math.pi, 3)
    sway = gaussian_process_path(rng, rng.uniform(0.8, 2.0), rng.uniform(0.3, 1.0), rng.uniform(0, 2 * math.pi))
    swayed, trembling, rolls = rng.uniform(0.0, 0.5), rng.uniform(0.0, 0.15), rng.uniform(0.0, 0.6)
    for _ in range(12):
        span = read * frame.size / rows  # between the crop's first row and its last
        whole = seconds + span

        def path(time: np.ndarray, whole: float = whole) -> np.ndarray:
            """(column, row, roll) [..., 3] at times in s, any scale."""
            part = time / whole
            at = part * (len(sway) - 1)
            curves = [np.interp(at, np.arange(len(sway)), sway[:, axis]) for axis in (0, 1)]
            shakes = [np.sin(2 * math.pi * frequency * time + phase) for phase in phases]
            moved = [
                part * way + swayed * c + trembling * s
                for way, c, s in zip((math.cos(angle), math.sin(angle)), curves, shakes, strict=False)
            ]
            return np.stack([*moved, rolls * (part + shakes[2] * trembling)], axis=-1)

        rolling = _of_path(path, seconds, span, frame.size, extent)
        if rolling.margin <= reach_of(extent):
            break
        read /= 2  # rows so unlike that one of them would reach far beyond the others
    assert rolling.margin <= reach_of(extent)
    facts = {"exposure": seconds, "readout": read, "tremor_hz": frequency, "moments": len(rolling.ends)}
    return rolling, facts | {"extent_max": rolling.extent_max}


def _of_path(path, seconds: float, span: float, size: int, extent: float) -> Rolling:
    begin = np.linspace(0.0, span, size)

    def ends_at(count: int) -> np.ndarray:
        """Displacements [N, S, 2 ends, 2] of unit scale, of mean 0 over every row's exposure."""
        time = begin[None, :] + (np.arange(count)[:, None] + 0.5) / count * seconds
        moved = path(time)
        across, down = np.array([-0.5, 0.5]), np.linspace(-0.5, 0.5, size)
        columns = moved[..., 0, None] - moved[..., 2, None] * down[None, :, None]
        rows = moved[..., 1, None] + moved[..., 2, None] * across
        ends = np.stack([columns + 0 * rows, rows], axis=-1)
        return ends - ends.mean(axis=0)

    coarse = ends_at(64)
    scale = extent / max(np.ptp(coarse, axis=0).max(axis=-1).mean(), 1e-12)
    travelled = np.hypot(*np.moveaxis(np.diff(coarse, axis=0), -1, 0)).sum(axis=0).max() * scale
    ends = ends_at(int(np.clip(math.ceil(travelled / _STEP), *_MOMENTS)))
    ends *= extent / max(np.ptp(ends, axis=0).max(axis=-1).mean(), 1e-12)
    extents = np.ptp(ends, axis=0).max(axis=-1)
    kernel = kernel_of_path(-ends[:, size // 2].mean(axis=1)[:, ::-1])
    margin = math.ceil(np.abs(ends).max()) + 1
    places = np.zeros((size, 2, 2))
    places[:, 1, 0], places[:, :, 1] = size - 1, np.arange(size)[:, None]
    return Rolling((ends + places).astype(np.float32), kernel, margin, float(extents.mean()), float(extents.max()))


def rolling_blur(window: np.ndarray, motion: Rolling) -> np.ndarray:
    """Average of the moments: window [S + 2m, S + 2m, 3] float32 linear light, m = motion.margin → [S, S, 3]."""
    size = window.shape[0] - 2 * motion.margin
    along = np.linspace(0.0, 1.0, size, dtype=np.float32)[None, :]
    result = np.zeros((size, size, window.shape[2]), np.float32)
    share = 1.0 / len(motion.ends)
    for ends in motion.ends + np.float32(motion.margin):
        columns, rows = (ends[:, :1, axis] + (ends[:, 1:, axis] - ends[:, :1, axis]) * along for axis in (0, 1))
        pose = cv2.remap(window, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        cv2.scaleAdd(pose, share, result, result)
    return result
