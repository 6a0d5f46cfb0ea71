"""Blur from video: a window of high-frame-rate frames averaged in linear light, sharp at the centroid of its time."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from data.blur.photometry import decode, encode, response_curve

# Frames per window that GoPro's average over (Nah et al., CVPR 2017, use 7–13; longer ones are severer).
GOPRO_LEVELS = (7, 11, 15, 19, 23, 31)

# Motion between frames is that of the fastest pixels, this quantile; above it flow is mostly mistakes.
_FASTEST = 0.98

# Most frames put between two: a gap that needs more is a cut, not a motion.
_MAX_SUBFRAMES = 64

_GRID = 16  # px between the points whose paths are followed
_FLAT = 1e-3  # λ₀ of `structure`: pans over 12 photographs then read 0 to 9 % low, 0 to 48 % without weights


@dataclass(frozen=True)
class FrameWindow:
    """A window's average and its middle frame, both [H, W, 3] uint8.

    extent and extent_max: mean and largest extent over the picture, px, along the chained optical flow, the mean over
    what has structure (of flat sky flow knows nothing and says 0); step: fastest motion between two frames, px;
    subframes: frames averaged in all, interpolated ones included.
    """

    blurry: np.ndarray
    sharp: np.ndarray
    extent: float
    extent_max: float
    step: float
    subframes: int


def average_window(
    frames: np.ndarray,
    *,
    curve: str = "gamma",
    curve_parameter: float = 2.2,
    max_step: float = 1.5,
    gaps: Literal["refuse", "interpolate"] = "refuse",
) -> FrameWindow:
    """Average an odd number of consecutive frames [N, H, W, 3] uint8 RGB in linear light, evenly over the exposure.

    curve, curve_parameter: the camera's response (see `data.blur.photometry.response`). Frames farther apart than
    max_step px (98th percentile over the pixels) would leave ghost copies: such a window is refused, or frames in
    between are interpolated along bidirectional flow. The ground truth is the middle frame, untouched.
    Raises ValueError for an even or too short window, frames that are not RGB uint8 of one shape, or a gap too wide.
    """
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        what = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise ValueError(f"frames are {what}: give RGB uint8 [N, H, W, 3]")
    count = len(frames)
    if count < 3 or count % 2 == 0:
        raise ValueError(f"window of {count} frames: give an odd number from 3, so that one frame is at its middle")
    if min(frames.shape[1:3]) < 16:
        raise ValueError(f"frames of {frames.shape[1]}×{frames.shape[2]} px: give 16 px or more, flow needs them")
    forward = [flow_between(a, b) for a, b in itertools.pairwise(frames)]
    steps = [float(np.quantile(np.hypot(flow[..., 0], flow[..., 1]), _FASTEST)) for flow in forward]
    if max(steps) > max_step and gaps == "refuse":
        at = int(np.argmax(steps))
        raise ValueError(
            f"frames {at} and {at + 1} of the window lie {max(steps):.1f} px apart, more than {max_step:g}: skip the"
            ' window, use a higher frame rate, or gaps="interpolate"'
        )
    if max(steps) > max_step * _MAX_SUBFRAMES:
        at = int(np.argmax(steps))
        raise ValueError(
            f"frames {at} and {at + 1} of the window lie {max(steps):.0f} px apart: a cut? skip the window"
        )
    response = response_curve(curve, curve_parameter)
    # Trapezoids: every interval between frames lasts equally long, and shares its end frames with its neighbours.
    total = np.zeros(frames.shape[1:], np.float32)
    subframes = 1
    for i, (flow, step) in enumerate(zip(forward, steps, strict=True)):
        parts = max(1, math.ceil(step / max_step))
        first, last = decode(frames[i], response), decode(frames[i + 1], response)
        total += (first + last) * np.float32(0.5 / parts)
        if parts > 1:
            backward = flow_between(frames[i + 1], frames[i])
            for part in range(1, parts):
                total += in_between(first, last, flow, backward, part / parts) * np.float32(1 / parts)
        subframes += parts
    if subframes == count:
        # Nothing to interpolate: the plain mean, as the field's datasets are made.
        total = (total + np.float32(0.5) * (decode(frames[0], response) + decode(frames[-1], response))) / count
    else:
        # The exposure lasts from the first frame to the last; holding those longer would leave two faint copies.
        total /= count - 1
    blurry = encode(total, response)
    extents = chained_extents(forward)
    extent = float(np.average(extents, weights=structure(frames[count // 2])))
    return FrameWindow(blurry, frames[count // 2].copy(), extent, float(extents.max()), max(steps), subframes)


def flow_between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dense optical flow [H, W, 2] (x, y) px from one frame [H, W, 3] uint8 to another (Farnebäck 2003).

    Farnebäck's flow stays small where a picture is flat, and frames of one window lie close together. Large frames are
    measured at half their size.
    """
    height, width = first.shape[:2]
    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    halve = min(height, width) > 480
    if halve:
        grey = [cv2.resize(g, (width // 2, height // 2), interpolation=cv2.INTER_AREA) for g in grey]
    levels = int(np.clip(math.log2(min(grey[0].shape) / 24), 1, 5)) if min(grey[0].shape) > 48 else 1
    flow = cv2.calcOpticalFlowFarneback(grey[0], grey[1], None, 0.5, levels, 15, 3, 5, 1.1, 0)
    if not halve:
        return flow
    scale = np.array([width / (width // 2), height / (height // 2)], np.float32)
    return cv2.resize(flow, (width, height), interpolation=cv2.INTER_LINEAR) * scale


def in_between(
    first: np.ndarray, last: np.ndarray, forward: np.ndarray, backward: np.ndarray, time: float
) -> np.ndarray:
    """The picture at `time` in (0, 1) between two [H, W, 3] float32, by flows both ways [H, W, 2].

    Flow at the time itself is approximated from both (Jiang et al., Super SloMo, CVPR 2018, equation 4).
    """
    to_first = time * (time * backward - (1 - time) * forward)
    to_last = (1 - time) * ((1 - time) * forward - time * backward)
    return (1 - time) * _pulled(first, to_first) + time * _pulled(last, to_last)


def structure(frame: np.ndarray) -> np.ndarray:
    """Weights [P] in (0, 1) of the grid's points in a frame [H, W, 3] uint8: near 0 where there is nothing to follow.

    λ / (λ + λ₀), λ the smaller eigenvalue of the gradients' second moments (Shi and Tomasi, CVPR 1994).
    """
    grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    smaller = np.maximum(cv2.cornerMinEigenVal(grey, 15, 3), 1e-9)[_GRID // 2 :: _GRID, _GRID // 2 :: _GRID]
    return (smaller / (smaller + _FLAT)).reshape(-1)


def chained_extents(flows: list[np.ndarray]) -> np.ndarray:
    """Extents [P] px of the paths that a grid of points takes through consecutive flows [H, W, 2] (x, y)."""
    height, width = flows[0].shape[:2]
    columns, rows = np.meshgrid(
        np.arange(_GRID // 2, width, _GRID, dtype=np.float32), np.arange(_GRID // 2, height, _GRID, dtype=np.float32)
    )
    path = [np.stack([columns, rows], axis=-1)]
    for flow in flows:
        at = path[-1]
        path.append(at + cv2.remap(flow, at[..., 0], at[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
    return np.ptp(np.stack(path), axis=0).max(axis=-1).reshape(-1)


def _pulled(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    height, width = flow.shape[:2]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(
        image, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
