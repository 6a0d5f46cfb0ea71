"""Frame windows from videos and folders of frames, for shard sets; `data.blur.frames` averages each window.

Videos are read by PyAV (extra `video`), folders as the images in them by name, such as GOPRO_Large_all's sequences.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.blur.frames import GOPRO_LEVELS, FrameWindow, average_window
from data.errors import DataError
from data.image import decode_image
from data.prepare.layouts import images_in

VIDEO_SUFFIXES = ("mp4", "mov", "mkv", "avi", "webm", "m4v")


@dataclass(frozen=True)
class Windows:
    """Which windows to make: odd numbers of frames (levels), the step between windows, the largest flow accepted.

    `stride` 0 means one window after another; `flow` says what happens above `max_flow` px between neighbouring frames:
    "interpolate" or "refuse"; `curve` is the camera's response, "srgb" or "gamma" (2.2, as GoPro's pairs were made).
    """

    levels: tuple[int, ...] = GOPRO_LEVELS
    stride: int = 0
    max_flow: float = 1.5
    flow: str = "interpolate"
    curve: str = "srgb"

    def __post_init__(self) -> None:
        if not self.levels or any(level < 3 or level % 2 == 0 for level in self.levels):
            raise DataError(f"levels {list(self.levels)}: give odd numbers from 3, so that one frame is the middle")
        if len(set(self.levels)) != len(self.levels):
            raise DataError(f"levels {list(self.levels)}: one is given twice")
        if self.stride < 0 or not self.max_flow > 0:
            raise DataError(
                f"stride {self.stride}, max_flow {self.max_flow}: stride must be 0 or more, max_flow above 0"
            )
        if self.flow not in ("interpolate", "refuse"):
            raise DataError(f"flow {self.flow!r}: one of interpolate, refuse")
        if self.curve not in ("srgb", "gamma"):
            raise DataError(f"curve {self.curve!r}: one of srgb, gamma")


@dataclass(frozen=True)
class Window(FrameWindow):
    """One averaged window, the number of its first frame, and how many frames it averages (level)."""

    first: int
    level: int


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


# -- windows ----------------------------------------------------------------------------------------------------------
def make_windows(frames: Iterable[np.ndarray], windows: Windows) -> Iterator[Window | tuple[int, int]]:
    """Every window of a sequence, all levels; a refused one comes as (first frame, level)."""
    largest, first = max(windows.levels), 0
    held: list[np.ndarray] = []
    for number, frame in enumerate(frames):
        if held and frame.shape != held[-1].shape:
            sizes = f"{frame.shape[:2]}, those before are {held[-1].shape[:2]}"
            raise DataError(f"frame {number} is {sizes}; split the sequence")
        if min(frame.shape[:2]) < 16:
            raise DataError(f"frame {number} is {frame.shape[:2]} px; windows need 16 px a side")
        held.append(frame)
        if len(held) > largest:
            del held[0]
            first += 1
        for level in windows.levels:
            start = number + 1 - level
            if start < 0 or start % (windows.stride or level):
                continue
            try:
                made = average_window(
                    np.stack(held[start - first : start - first + level]),
                    curve=windows.curve,
                    max_step=windows.max_flow,
                    gaps=windows.flow,
                )
            except ValueError:  # the frames are sound, so only their motion can be refused
                yield start, level
            else:
                yield Window(**vars(made), first=start, level=level)
