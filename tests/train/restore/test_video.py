"""Videos: every frame at its time, the sound as it was, and pieces that go on after a stop."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.train.restore.known import Known
from train.restore.files import How, Outcome
from train.restore.picture import PictureError
from train.restore.restorer import Restorer
from train.restore.sources import Job, find_jobs
from train.restore.video import restore_video

av = pytest.importorskip("av")
RATE = 24000


def frame(number: int, size: tuple[int, int]) -> np.ndarray:
    """A smooth picture whose brightness says its number."""
    y, x = np.mgrid[: size[1], : size[0]]
    grey = 40 + 2 * number + 30 * np.sin(x / 9 + number) + 30 * np.cos(y / 7)
    return np.stack([grey, grey * 0.8, grey * 0.5 + 40], axis=2).clip(0, 255).astype(np.uint8)


def film(
    path: Path, *, count: int = 20, size=(64, 48), sound: str | None = "aac", colorspace: int = 1, gaps=()
) -> Path:
    """H.264 with B-frames at 24000/1001 a second; `gaps`: frames that are shown twice as long."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=Fraction(24000, 1001), options={"crf": "5", "g": "7"})
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        video.codec_context.colorspace = colorspace
        video.codec_context.time_base = Fraction(1, RATE)
        audio = out.add_stream(sound, rate=8000) if sound else None
        if audio is not None:
            audio.layout = "mono"
        stamp = 0
        for number in range(count):
            image = av.VideoFrame.from_ndarray(frame(number, size), format="rgb24")
            image = image.reformat(format="yuv420p", dst_colorspace=colorspace)
            image.pts, image.time_base = stamp, Fraction(1, RATE)
            stamp += 1001 * (2 if number in gaps else 1)
            out.mux(video.encode(image))
        out.mux(video.encode(None))
        if audio is not None:
            wave = (8000 * np.sin(np.arange(8000 * count // 24) / 5)).astype(np.int16)[None]
            block = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            block.sample_rate, block.pts = 8000, 0
            resampler = av.AudioResampler(format=audio.format, layout="mono", rate=8000, frame_size=1024)
            for part in (*resampler.resample(block), *resampler.resample(None)):
                out.mux(audio.encode(part))
            out.mux(audio.encode(None))
    return path


def stamps(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        return [float(image.time) for image in container.decode(video=0)]


def pictures(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [image.to_ndarray(format="rgb24").astype(int) for image in container.decode(video=0)]


def sounds(path: Path) -> bytes:
    with av.open(str(path)) as container:
        return b"".join(bytes(packet) for packet in container.demux(audio=0))


def restored(source: Path, target: Path, network=None, **more) -> Outcome:
    how = How(**{key: more.pop(key) for key in ("overwrite", "skip_existing", "strength") if key in more})
    return restore_video(Restorer(network or Known(), 64), Job(source, target), how, **more)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr("train.restore.video.PIECE", 6)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_frames_times_and_sound_stay(tmp_path, suffix):
    source, target = film(tmp_path / f"a{suffix}", gaps=(3, 11)), tmp_path / f"b{suffix}"
    outcome = restored(source, target)
    assert (outcome.status, outcome.problem, outcome.size) == ("restored", None, (64, 48))
    assert np.abs(np.subtract(stamps(source), stamps(target))).max() < 1e-3
    assert len(stamps(target)) == 20
    assert sounds(source) == sounds(target) != b""
    differences = [np.abs(a - b).mean() for a, b in zip(pictures(source), pictures(target), strict=True)]
    assert max(differences) < 2
    with av.open(str(target)) as container:
        assert container.streams.video[0].codec_context.colorspace == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, target.name]


def test_frames_are_restored_and_colours_of_either_matrix_stay(tmp_path):
    for code in (1, 5):
        source = film(tmp_path / f"{code}.mp4", colorspace=code, sound=None)
        target = tmp_path / f"{code}-out.mp4"
        assert restored(source, target, Known(shift=0.1)).status == "restored"
        moved = np.mean(
            [(b - a).mean(axis=(0, 1)) for a, b in zip(pictures(source), pictures(target), strict=True)], axis=0
        )
        assert np.abs(moved - 25.5).max() < 1.5


def test_a_stopped_one_goes_on_where_it_was(tmp_path):
    class Stops(Known):
        def forward(self, image):
            if len(self.sizes) == 14:
                raise KeyboardInterrupt
            return super().forward(image)

    source, target = film(tmp_path / "a.mp4"), tmp_path / "b.mp4"
    with pytest.raises(KeyboardInterrupt):
        restored(source, target, Stops())
    assert not target.exists()
    (folder,) = tmp_path.glob("b.mp4.*.parts")
    assert sorted(path.name for path in folder.iterdir()) == ["00000000.mkv", "00000006.mkv"]
    network = Known()
    assert restored(source, target, network).status == "restored"
    assert len(network.sizes) == 20 - 12
    whole = tmp_path / "c.mp4"
    restored(source, whole)
    assert [each.tolist() for each in pictures(target)] == [each.tolist() for each in pictures(whole)]


def test_pieces_of_other_settings_are_not_taken(tmp_path):
    source, target = film(tmp_path / "a.mp4", sound=None), tmp_path / "b.mp4"
    assert restored(source, target, rank=0, world=2).status == "part"
    network = Known()
    assert restored(source, target, network, strength=0.5).status == "restored"
    assert len(network.sizes) == 20


def test_ranks_share_one_video_and_the_last_joins(tmp_path):
    source, target = film(tmp_path / "a.mp4"), tmp_path / "b.mp4"
    networks, told = [Known() for _ in range(3)], []
    statuses = [
        restored(source, target, networks[rank], rank=rank, world=3, on_frame=lambda *far: told.append(far)).status
        for rank in (2, 0, 1)
    ]
    assert statuses == ["part", "part", "restored"]
    assert [len(network.sizes) for network in networks] == [6 + 2, 6, 6]
    assert told[-1] == (6, 6)
    assert len(stamps(target)) == 20
    assert restored(source, target).problem.startswith(f"{target}: exists")
    assert restored(source, target, skip_existing=True).status == "there"


def test_odd_sizes_and_containers_that_are_only_read(tmp_path):
    source = film(tmp_path / "a.mkv", sound=None)
    with av.open(str(tmp_path / "odd.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 51, 37, "yuv444p"
        for number in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame(number, (51, 37)), format="rgb24")))
        out.mux(stream.encode(None))
    assert restored(tmp_path / "odd.mkv", tmp_path / "odd-out.mkv").size == (51, 37)
    for before, after in zip(pictures(tmp_path / "odd.mkv"), pictures(tmp_path / "odd-out.mkv"), strict=True):
        assert np.abs(before - after).mean() < 2
    assert restored(source, tmp_path / "x.avi").problem.endswith(".mp4, .m4v, .mov, .mkv")
    assert find_jobs([str(source.rename(tmp_path / "a.avi"))], None).jobs[0].target.name == "a_restored.mkv"


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "audio alone"])
def test_bad_videos_are_told_and_nothing_is_left(tmp_path, damage):
    source = film(tmp_path / "a.mp4")
    data = source.read_bytes()
    if damage == "audio alone":
        with av.open(str(source), "w", format="mp4") as out:
            stream = out.add_stream("aac", rate=8000)
            block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            block.sample_rate = 8000
            out.mux(stream.encode(block))
            out.mux(stream.encode(None))
    else:
        source.write_bytes({"empty": b"", "text": b"hello" * 100, "cut": data[: len(data) // 2]}[damage])
    outcome = restored(source, tmp_path / "b.mp4")
    assert outcome.status == "failed"
    assert str(source) in outcome.problem
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("sound", ["pcm_u8", "wavpack", "tta"])
def test_sound_that_the_container_cannot_hold_is_said_before_any_frame_is_restored(tmp_path, sound):
    source, target = film(tmp_path / "a.mkv", sound=sound), tmp_path / "b.mp4"
    network = Known()
    outcome = restored(source, target, network)
    assert f"{sound}) does not go into .mp4: give -o NAME.mkv" in outcome.problem
    assert not network.sizes
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]
    assert restored(source, tmp_path / "b.mkv").status == "restored"


def test_a_rank_without_a_piece_leaves_a_finished_video_alone(tmp_path):
    source, target = film(tmp_path / "a.mp4", sound=None, count=5), tmp_path / "b.mp4"
    assert restored(source, target, rank=1, world=2).status == "part"
    assert not list(tmp_path.glob("*.parts"))
    assert restored(source, target, rank=0, world=2).status == "restored"
    late = restored(source, target, rank=1, world=2)
    assert (late.status, late.problem) == ("part", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_pieces_of_a_video_are_no_videos_to_restore(tmp_path, monkeypatch):
    source = film(tmp_path / "a.mp4", sound=None)
    assert restored(source, tmp_path / "a_restored.mp4", rank=0, world=2).status == "part"
    assert list(tmp_path.glob("*.parts/*.mkv"))
    assert [job.source for job in find_jobs([str(tmp_path)], None).jobs] == [source]
    monkeypatch.chdir(tmp_path)
    assert [job.source.name for job in find_jobs(["**/*.m*"], tmp_path / "out").jobs] == ["a.mp4"]


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    outcome = restored(tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert (outcome.status, "a.mp4: is no file" in outcome.problem) == ("failed", True)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_pixels_that_are_no_squares_stay_so(tmp_path, suffix):
    source, target = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    with av.open(str(source), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(16, 11)
        for number in range(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame(number, (64, 48)), format="rgb24")))
        out.mux(stream.encode(None))
    assert restored(source, target).status == "restored"
    with av.open(str(target)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(16, 11)


@pytest.mark.parametrize("full", [False, True])
def test_at_strength_0_brightness_is_what_it_was(tmp_path, full):
    source, target = tmp_path / "a.mkv", tmp_path / "b.mkv"
    levels = range(40, 220, 3)
    with av.open(str(source), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.color_range, stream.codec_context.colorspace = 1 + full, 1
        for level in levels:
            image = av.VideoFrame(64, 48, "yuv420p")
            for number, plane in enumerate(image.planes):
                plane.update(np.full(plane.buffer_size, 128 if number else level, np.uint8))
            image.color_range, image.colorspace = 1 + full, 1
            out.mux(stream.encode(image))
        out.mux(stream.encode(None))
    assert restored(source, target, strength=0).status == "restored"
    with av.open(str(target)) as container:
        after = [np.asarray(image.to_ndarray())[:48].mean() for image in container.decode(video=0)]
    wanted = [16 + level * 219 / 255 if full else level for level in levels]
    assert abs(np.mean(np.subtract(after, wanted))) < 0.15
    assert np.abs(np.subtract(after, wanted)).max() < 1.1


def test_a_damaged_frame_is_named(tmp_path):
    source = film(tmp_path / "a.mkv", sound=None, count=30)
    from train.restore.movie import frames_of, open_film

    whole = open_film(source)
    missing = whole.__class__(**{**vars(whole), "stamps": (*whole.stamps[:4], whole.stamps[4] + 1, *whole.stamps[5:])})
    with pytest.raises(PictureError, match=r"the frame at 0\.\d+ s does not decode"):
        list(frames_of(missing, 0, 10))
