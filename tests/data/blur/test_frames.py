"""Frame windows of video: linear-light average, ground truth at the middle, gaps refused or interpolated."""

from itertools import pairwise

import cv2
import numpy as np
import pytest

from data.blur import sample_rng
from data.blur.frames import average_window, chained_extents, flow_between
from data.image import psnr


@pytest.fixture(scope="module")
def panorama() -> np.ndarray:
    noise = sample_rng(0, 0, "panorama", 0).random((260, 420, 3)).astype(np.float32)
    smooth = sum(cv2.GaussianBlur(noise, (0, 0), s) * s for s in (1.5, 4, 10))
    return np.clip(128 + 70 * (smooth - smooth.mean()) / smooth.std(), 0, 255).astype(np.uint8)


def clip(panorama: np.ndarray, count: int, step: float) -> np.ndarray:
    """A pan of `step` px a frame: [N, 160, 200, 3] uint8."""
    moves = [np.array([[1, 0, -20 - i * step], [0, 1, -30]], np.float32) for i in range(count)]
    return np.stack([cv2.warpAffine(panorama, m, (200, 160), flags=cv2.INTER_LINEAR) for m in moves])


def test_close_frames_give_the_plain_mean_of_linear_light_and_the_middle_frame(panorama):
    frames = clip(panorama, 9, 1.0)
    window = average_window(frames)
    expected = 255 * ((frames / 255.0) ** 2.2).mean(axis=0) ** (1 / 2.2)
    assert np.abs(window.blurry - expected).max() <= 0.6
    assert np.array_equal(window.sharp, frames[4])
    assert window.subframes == 9
    assert window.extent == pytest.approx(8, abs=0.6)
    assert window.step == pytest.approx(1, abs=0.3)


def test_the_extent_is_that_of_what_can_be_followed(panorama):
    frames = clip(panorama, 9, 2.0)
    frames[:, :110] = 200  # a sky
    assert average_window(frames, max_step=3).extent == pytest.approx(16, rel=0.08)


def test_a_gap_is_refused_by_default(panorama):
    with pytest.raises(ValueError, match=r"frames \d and \d of the window lie .* px apart, more than 1.5"):
        average_window(clip(panorama, 5, 5.0))


def test_interpolation_fills_the_gap_without_ghost_copies(panorama):
    dense = average_window(clip(panorama, 25, 1.0))
    sparse = clip(panorama, 25, 1.0)[::6]
    filled = average_window(sparse, gaps="interpolate")
    combed = average_window(sparse, max_step=100)
    inner = slice(30, -30)
    near, far = (psnr(dense.blurry[:, inner].copy(), w.blurry[:, inner].copy()) for w in (filled, combed))
    assert near > 38
    assert near > far + 5
    assert filled.subframes > 15
    assert np.array_equal(filled.sharp, sparse[2])


def test_flow_follows_a_known_shift_and_paths_add_up(panorama):
    frames = clip(panorama, 4, 3.0)
    flow = flow_between(frames[0], frames[1])
    assert np.median(flow[..., 0]) == pytest.approx(-3, abs=0.2)
    assert np.median(flow[..., 1]) == pytest.approx(0, abs=0.1)
    extents = chained_extents([flow_between(a, b) for a, b in pairwise(frames)])
    assert np.median(extents) == pytest.approx(9, abs=0.6)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((4, 32, 32, 3), np.uint8), "window of 4 frames: give an odd number"),
        (np.zeros((1, 32, 32, 3), np.uint8), "window of 1 frames"),
        (np.zeros((5, 32, 32, 3), np.float32), "RGB uint8"),
        (np.zeros((5, 32, 32), np.uint8), "RGB uint8"),
        ([1, 2, 3], "frames are list"),
        (np.zeros((5, 8, 32, 3), np.uint8), "16 px or more"),
    ],
)
def test_wrong_windows_are_named(frames, message):
    with pytest.raises(ValueError, match=message):
        average_window(frames)


def test_a_still_window_is_the_frame_itself(panorama):
    frames = np.repeat(clip(panorama, 1, 0.0), 7, axis=0)
    window = average_window(frames)
    assert np.array_equal(window.blurry, frames[0])
    assert window.extent < 0.1
