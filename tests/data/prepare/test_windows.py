"""Windows of frames: averaged in linear light, centred in time, no ghosts; videos and folders read the same way."""

import json

import cv2
import numpy as np
import pytest

from data.errors import DataError
from data.image import encode_png, psnr
from data.prepare.jobs import prepare_dataset
from data.prepare.layouts import LAYOUTS
from data.prepare.recipe import Recipe
from data.prepare.windows import Windows, frame_sources, make_windows, read_frames
from data.shards.set import ShardSet
from tests.data.pictures import picture


def scene(width: int = 260, height: int = 96) -> np.ndarray:
    """A smooth texture that can be shifted by parts of a pixel."""
    return cv2.GaussianBlur(picture(3, height, width), (0, 0), 2.5)


def shifted(amount: float, width: int = 128) -> np.ndarray:
    """The scene seen by a camera that moved `amount` px to the right."""
    matrix = np.float32([[1, 0, -60 - amount], [0, 1, 0]])
    return cv2.warpAffine(scene(), matrix, (width, 96), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def only(windows) -> list:
    return [window for window in windows if not isinstance(window, tuple)]


def test_average_is_of_light_not_of_codes():
    frames = [np.full((32, 32, 3), value, np.uint8) for value in (0, 0, 128)]
    (window,) = make_windows(frames, Windows(levels=(3,), max_flow=1e9))
    assert window.blurry[0, 0, 0] == 76  # a third of the light; a mean of codes would say 43


def test_truth_is_the_frame_in_the_middle_of_every_window():
    frames = [np.full((16, 16, 3), 10 * n, np.uint8) for n in range(20)]
    windows = list(make_windows(frames, Windows(levels=(3, 7), max_flow=1e9)))
    assert [(w.level, w.first) for w in windows if w.level == 3] == [(3, n) for n in (0, 3, 6, 9, 12, 15)]
    assert [(w.level, w.first) for w in windows if w.level == 7] == [(7, 0), (7, 7)]
    for window in windows:
        assert window.sharp[0, 0, 0] == 10 * (window.first + window.level // 2)


def test_stride_makes_overlapping_windows():
    frames = [np.zeros((16, 16, 3), np.uint8)] * 9
    assert [w.first for w in make_windows(frames, Windows(levels=(5,), stride=2))] == [0, 2, 4]


def test_a_static_scene_stays_as_it_is():
    (window,) = make_windows([shifted(0)] * 7, Windows(levels=(7,)))
    np.testing.assert_array_equal(window.blurry, window.sharp)
    assert window.subframes == 7


def test_interpolation_removes_the_ghosts_of_frames_too_far_apart():
    inner = np.s_[16:-16, 24:-24]
    exact = [shifted(n) for n in np.arange(-12, 12.01, 1)]
    (truth,) = only(make_windows(exact, Windows(levels=(25,), max_flow=1e9)))
    truth = truth.blurry[inner]
    coarse = [shifted(n) for n in (-12, -8, -4, 0, 4, 8, 12)]
    (smooth,) = only(make_windows(coarse, Windows(levels=(7,), max_flow=1.5)))
    (ghosts,) = only(make_windows(coarse, Windows(levels=(7,), max_flow=1e9)))
    assert smooth.subframes >= 6 * 3 + 1
    assert psnr(smooth.blurry[inner], truth) > psnr(ghosts.blurry[inner], truth) + 3
    assert smooth.extent == pytest.approx(24, rel=0.15)


def test_windows_that_move_too_fast_are_refused_and_named():
    coarse = [shifted(4 * n) for n in range(7)]
    assert list(make_windows(coarse, Windows(levels=(7,), flow="refuse"))) == [(0, 7)]


@pytest.mark.parametrize(
    "options", [{"levels": ()}, {"levels": (4,)}, {"levels": (1,)}, {"max_flow": 0}, {"flow": "x"}]
)
def test_windows_that_make_no_sense_are_refused(options):
    with pytest.raises(DataError):
        Windows(**options)


def test_frames_of_two_sizes_are_an_error():
    with pytest.raises(DataError, match="frame 1 is"):
        list(make_windows([shifted(0), shifted(0, width=100)], Windows()))


def write_sequence(folder, count: int = 8) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:06d}.png").write_bytes(encode_png(shifted(number)))


def test_gopro_large_all_becomes_pairs_of_the_asked_levels(tmp_path):
    for name in ("GOPR0372_07_00", "GOPR0372_07_01"):
        write_sequence(tmp_path / "all" / "train" / name)
    recipe = Recipe(windows=Windows(levels=(3, 7)), tile=0)
    prepare_dataset("gopro", tmp_path / "all", tmp_path / "one", recipe, split="train")
    done = prepare_dataset("gopro", tmp_path / "all", tmp_path / "two", recipe, split="train", workers=2)
    assert (done.samples, done.refused) == (2 * 3, [])
    shards = ShardSet(tmp_path / "one")
    assert shards.kind == "pairs"
    facts = json.loads(shards.read(2, "json"))
    assert (facts["level"], facts["first_frame"], facts["source"]) == (7, 0, "GOPR0372_07_00")
    assert facts["extent_px"] == pytest.approx(6, rel=0.05)
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["licence"] == LAYOUTS["gopro"].licence
    assert [path.read_bytes() for path in sorted((tmp_path / "one").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "two").iterdir())
    ]


def write_video(path, frames) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=240)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv444p"
        stream.options = {"crf": "0"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def test_video_gives_the_frames_it_was_made_of(tmp_path):
    frames = [shifted(n) for n in range(7)]
    write_video(tmp_path / "clip.mp4", frames)
    read = list(read_frames(tmp_path / "clip.mp4"))
    assert len(read) == 7
    assert min(psnr(a, b) for a, b in zip(read, frames, strict=True)) > 38


def test_folder_of_videos_is_prepared_and_a_broken_one_named(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a clip.mp4", [shifted(n) for n in range(7)])
    (folder / "broken.mp4").write_bytes(b"\x00" * 2000)
    recipe = Recipe(windows=Windows(levels=(7,)))
    with pytest.raises(DataError, match=r"1 of 2 sources are bad.*broken\.mp4"):
        prepare_dataset("video", folder, tmp_path / "set", recipe)
    done = prepare_dataset("video", folder, tmp_path / "set", recipe, max_bad_fraction=0.5)
    assert done.samples == 1
    single = prepare_dataset("video", folder / "a clip.mp4", tmp_path / "single", recipe)
    assert single.samples == 1


def test_nothing_to_read_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match="no videos and no folders"):
        frame_sources(tmp_path)
    with pytest.raises(DataError, match="missing"):
        frame_sources(tmp_path / "nowhere")


def test_a_sequence_that_is_too_short_is_told_as_the_cause(tmp_path):
    write_sequence(tmp_path / "clip", 5)
    with pytest.raises(DataError, match="no samples") as caught:
        prepare_dataset("video", tmp_path, tmp_path / "set", Recipe(windows=Windows(levels=(7, 11))))
    assert caught.value.details == ["clip: 5 frames; the shortest window has 7"]
