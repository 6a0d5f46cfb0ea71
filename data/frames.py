"""Blur from high-frame-rate frames: windows averaged in linear light, the frame in the middle of the exposure as truth.

Averaging frames that lie far apart gives ghosts, not blur: where the flow between neighbours exceeds `max_flow` px,
frames are interpolated between them (Super SloMo's approximation of intermediate flow, Jiang et al., CVPR 2018, on DIS
flow), and a window whose flow is too large even for that is refused. Videos are read by PyAV (extra `video`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data.datasets import images_in
from data.errors import DataError
from data.image import decode_image

VIDEO_SUFFIXES = ("mp4", "mov", "mkv", "avi", "webm", "m4v")
MOST_INTERPOLATED = 8  # sub-steps between two frames; beyond it the flow itself is not to be trusted

_CODES = np.arange(256) / 255.0
_TO_LINEAR = np.where(_CODES <= 0.04045, _CODES / 12.92, ((_CODES + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_linear(image: np.ndarray) -> np.ndarray:
    """Linear light float32 in [0, 1] of sRGB uint8."""
    return _TO_LINEAR[image]


def to_srgb(light: np.ndarray) -> np.ndarray:
    """sRGB uint8, rounded, of linear light float32; values are clipped to [0, 1]."""
    light = np.clip(light, 0, 1)
    coded = np.where(light <= 0.0031308, light * 12.92, 1.055 * np.power(light, 1 / 2.4) - 0.055)
    return np.rint(coded * 255).astype(np.uint8)


@dataclass(frozen=True)
class Windows:
    """Which windows to make: odd numbers of frames (levels), the step between windows, the largest flow accepted.

    `stride` 0 means one window after another; `flow` says what happens above `max_flow` px between neighbouring frames
    (95th percentile): "interpolate" or "refuse".
    """

    levels: tuple[int, ...] = (7, 11, 15, 19, 23, 31)
    stride: int = 0
    max_flow: float = 1.5
    flow: str = "interpolate"

    def __post_init__(self) -> None:
        if not self.levels or any(level < 3 or level % 2 == 0 for level in self.levels):
            raise DataError(f"levels {list(self.levels)}: give odd numbers from 3, so that one frame is the middle")
        if self.stride < 0 or not self.max_flow > 0:
            raise DataError(
                f"stride {self.stride}, max_flow {self.max_flow}: stride must be 0 or more, max_flow above 0"
            )
        if self.flow not in ("interpolate", "refuse"):
            raise DataError(f"flow {self.flow!r}: one of interpolate, refuse")


@dataclass
class Window:
    """One averaged window: blurry and sharp uint8 [H, W, 3], first frame, level, sub-steps, path length in px."""

    blurry: np.ndarray
    sharp: np.ndarray
    first: int
    level: int
    steps: int
    path: float


def read_frames(source: Path) -> Iterator[np.ndarray]:
    """RGB uint8 frames of a video file or of a folder of images by name; DataError names what does not decode."""
    if source.is_dir():
        for path in images_in(source):
            yield decode_image(path.read_bytes(), str(path))
        return
    try:
        import av
    except ImportError:
        raise DataError(f"{source}: reading videos needs PyAV; install sharpprior[video]") from None
    try:
        with av.open(str(source)) as container:
            if not container.streams.video:
                raise DataError(f"{source}: no video stream in this file; leave it out")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                image = frame.to_ndarray(format="rgb24")
                yield np.ascontiguousarray(np.rot90(image, frame.rotation // 90)) if frame.rotation else image
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{source}: the video does not decode ({error}); replace it or leave it out") from None


def frame_sources(root: Path) -> list[Path]:
    """Videos and folders of frames under `root` (or `root` itself), such as the sequences of GOPRO_Large_all."""
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"{root}: missing; give a video, a folder of videos, or folders of frames")
    videos = [p for p in root.rglob("*") if p.suffix.lower().lstrip(".") in VIDEO_SUFFIXES and p.is_file()]
    folders = [p for p in (root, *root.rglob("*")) if p.is_dir() and images_in(p)]
    if not videos and not folders:
        raise DataError(f"{root}: no videos and no folders of frames here")
    return sorted(videos + folders)


# -- flow -------------------------------------------------------------------------------------------------------------


def flow_between(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Optical flow [H, W, 2] in px (x, y) from one RGB uint8 frame to the next (DIS, on grey)."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (one, two)]
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)


def flow_size(flow: np.ndarray) -> float:
    """95th percentile of the flow's length in px: what the fast parts of the picture do, outliers aside."""
    return float(np.percentile(np.hypot(flow[..., 0], flow[..., 1]), 95))


def _warp(light: np.ndarray, flow: np.ndarray) -> np.ndarray:
    rows, columns = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    return cv2.remap(
        light, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )


def between(one: np.ndarray, two: np.ndarray, forward: np.ndarray, backward: np.ndarray, t: float) -> np.ndarray:
    """Linear-light float32 frame at time t in (0, 1) between two linear-light frames, from the flow both ways."""
    to_one = -(1 - t) * t * forward + t * t * backward
    to_two = (1 - t) * (1 - t) * forward - t * (1 - t) * backward
    return (1 - t) * _warp(one, to_one) + t * _warp(two, to_two)


# -- windows ----------------------------------------------------------------------------------------------------------


def average(
    frames: Sequence[np.ndarray], flows: Sequence[np.ndarray], windows: Windows
) -> tuple[np.ndarray, int, float] | None:
    """(blurry uint8, sub-steps, path px) of n frames uint8 averaged in linear light; None where the window is refused.

    `flows` are the n − 1 forward flows between neighbours.
    """
    sizes = [flow_size(flow) for flow in flows]
    steps = max(1, int(np.ceil(max(sizes) / windows.max_flow)))
    if steps > (1 if windows.flow == "refuse" else MOST_INTERPOLATED):
        return None
    light = [to_linear(frame) for frame in frames]
    total = np.sum(light, axis=0, dtype=np.float64)
    if steps > 1:
        # Every interval gets the same sub-steps, or the fast parts of the path would be exposed longer.
        for i, forward in enumerate(flows):
            backward = flow_between(frames[i + 1], frames[i])
            for step in range(1, steps):
                total += between(light[i], light[i + 1], forward, backward, step / steps)
    count = (len(frames) - 1) * steps + 1
    return to_srgb((total / count).astype(np.float32)), steps, float(sum(sizes))


def make_windows(frames: Iterable[np.ndarray], windows: Windows) -> Iterator[Window | tuple[int, int]]:
    """Every window of a sequence, all levels; a refused one comes as (first frame, level)."""
    largest, first = max(windows.levels), 0
    held: list[np.ndarray] = []
    flows: list[np.ndarray] = []  # flows[i] leads from held[i] to held[i + 1]
    for number, frame in enumerate(frames):
        if held:
            if frame.shape != held[-1].shape:
                sizes = f"{frame.shape[:2]}, those before are {held[-1].shape[:2]}"
                raise DataError(f"frame {number} is {sizes}; split the sequence")
            flows.append(flow_between(held[-1], frame))
        held.append(frame)
        if len(held) > largest:
            del held[0], flows[0]
            first += 1
        for level in windows.levels:
            start = number + 1 - level
            if start < 0 or start % (windows.stride or level):
                continue
            chosen = slice(start - first, start - first + level)
            made = average(held[chosen], flows[chosen.start : chosen.stop - 1], windows)
            if made is None:
                yield start, level
            else:
                yield Window(made[0], held[chosen.start + level // 2], start, level, made[1], made[2])
