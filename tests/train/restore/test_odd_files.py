"""Odd files: what cameras, phones and other programs write, and what is nobody's fault. One never stops the others."""

import errno
import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from tests.train.restore.known import Known
from tests.train.restore.test_restore import of_status, restored
from train.restore.files import How, restore_files
from train.restore.picture import decode, encode, read_picture
from train.restore.restorer import Restorer
from train.restore.sources import find_jobs

EXIF, GPS = ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo


def camera() -> bytes:
    """Exif as a camera writes it, of a picture that was taken upright."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "camera", 1
    exif.get_ifd(EXIF).update({0x829A: 0.01, 0x9003: "2026:01:02 03:04:05", 0x9286: b"ASCII\0\0\0by the sea"})
    exif.get_ifd(GPS).update({1: "N", 2: (47.0, 22.0, 30.5)})
    return exif.tobytes()


def jpeg(exif: bytes) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 12), (10, 90, 200)).save(file, "JPEG", exif=exif)
    return file.getvalue()


def fails(*_, **__):
    raise RuntimeError("nobody thought of this")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_exposure_and_place_stay_in_every_kind_of_file(suffix, depth, channels):
    if (suffix, depth, channels) == (".tif", np.uint16, 2):
        pytest.skip("Pillow opens no 16-bit TIFF of grey and alpha")
    picture = decode(jpeg(camera()), "a.jpg")
    values = np.random.default_rng(channels).integers(0, np.iinfo(depth).max, (12, 9, channels)).astype(depth)
    colours = channels - (channels in (2, 4))
    picture.colour, picture.alpha = values[..., :colours], values[..., -1] if channels in (2, 4) else None
    data = encode(picture, suffix, "b")
    with Image.open(io.BytesIO(data)) as image:
        exif = image.getexif()
        assert exif[0x010F].rstrip("\0") == "camera"
        assert exif.get_ifd(EXIF)[0x829A] == pytest.approx(0.01)
        assert exif.get_ifd(EXIF)[0x9003] == "2026:01:02 03:04:05"
        assert exif.get_ifd(EXIF)[0x9286] == b"ASCII\0\0\0by the sea"
        assert exif.get_ifd(GPS)[1] == "N"
        assert [float(each) for each in exif.get_ifd(GPS)[2]] == [47.0, 22.0, 30.5]
    if suffix == ".tif":
        again = decode(data, "b.tif")
        np.testing.assert_array_equal(again.colour, picture.colour)
        if picture.alpha is not None:
            np.testing.assert_array_equal(again.alpha, picture.alpha)


@pytest.mark.parametrize("step", ["open", "save", "restore"])
def test_an_error_that_nobody_thought_of_is_of_one_picture(step, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.jpg", "c.png"):
        Image.new("RGB", (9, 12)).save(folder / name)
    network = Known()
    if step == "open":
        monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", fails)
    elif step == "save":
        monkeypatch.setitem(Image.SAVE, "JPEG", fails)
    else:
        monkeypatch.setattr(
            network, "forward", lambda image: fails() if len(network.sizes) == 1 else Known.forward(network, image)
        )
        outcomes = []
        network.sizes.append((0, 0))
        jobs = find_jobs([str(folder / "b.jpg")], tmp_path / "b.jpg").jobs
        restore_files(Restorer(network, 64), jobs, How(), on_done=outcomes.append)
        assert [each.status for each in outcomes] == ["failed"]
        assert "b.jpg: RuntimeError: nobody thought of this" in outcomes[0].problem
        return
    _, outcomes = restored(folder, tmp_path / "out", network)
    assert of_status(outcomes, "restored") == ["a.png", "c.png"]
    assert "nobody thought of this" in outcomes[1].problem
    assert "b.jpg: " in outcomes[1].problem


def test_exif_that_does_not_read_or_cannot_be_written_is_left_out():
    """An offset that leaves the block, a value of the wrong type, a block that is a number: all were tracebacks."""
    good = jpeg(camera())
    for at in range(good.index(b"Exif\0\0") + 6, good.index(b"Exif\0\0") + 120):
        for value in (0, 5, 12, 255):
            data = bytearray(good)
            data[at] = value
            picture = decode(bytes(data), "a.jpg")
            assert sorted(picture.colour.shape) == [3, 9, 12]
            for suffix in (".tif", ".png"):
                again = decode(encode(picture, suffix, f"b{suffix}"), f"b{suffix}")
                np.testing.assert_array_equal(again.colour, picture.colour)


def cut(data: bytes) -> bytes:
    return data[:60]


def unreadable(data: bytes) -> bytes:
    return b"Exif\0\0no block of Exif at all"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damaged", [cut, unreadable])
def test_damaged_exif_is_told_of_the_picture_that_has_it(kind, damaged, caplog):
    file = io.BytesIO()
    Image.new("RGB", (9, 12)).save(file, kind, exif=camera())
    assert decode(file.getvalue(), "good").exif is not None
    assert not caplog.messages
    Image.new("RGB", (9, 12)).save(file := io.BytesIO(), kind, exif=damaged(camera()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's are of no picture that a user could know
        decode(file.getvalue(), "bad")
    (told,) = caplog.messages
    assert told.startswith("bad: its Exif ")


def test_one_tag_that_cannot_be_kept_leaves_the_others(caplog):
    exif = Image.Exif()
    exif.load(camera())
    data = bytearray(jpeg(exif.tobytes()))
    at = data.index(b"\x01\x0f\x00\x02", data.index(b"Exif\0\0")) + 3  # the maker's name …
    data[at] = 5  # … as a fraction
    kept = Image.Exif()
    kept.load(decode(bytes(data), "a.jpg").exif)
    assert kept.get_ifd(EXIF)[0x9003] == "2026:01:02 03:04:05"
    assert caplog.messages == ["a.jpg: its Exif is damaged: what does not read of it is left out"]


def test_threads_that_read_pictures_leave_warnings_as_they_were():
    before = list(warnings.filters)
    data = jpeg(camera())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: decode(data, str(n)), range(400)))
    assert list(warnings.filters) == before


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_pillow_turns_them(kind, orientation):
    coarse = np.random.default_rng(orientation).integers(0, 256, (3, 4, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(np.kron(coarse, np.ones((8, 8, 1), np.uint8))).save(file := io.BytesIO(), kind, exif=exif, **how)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert expected.shape == ((24, 32, 3) if orientation < 5 else (32, 24, 3))
    np.testing.assert_array_equal(decode(file.getvalue(), "a").colour, expected)


def test_exif_that_fails_at_writing_is_left_out_and_told(caplog, monkeypatch):
    picture = decode(jpeg(camera()), "a.jpg")
    monkeypatch.setattr("train.restore.tiff._append", fails)
    assert decode(encode(picture, ".tif", "b.tif"), "b.tif").exif is None
    assert caplog.messages == [
        "b.tif: its Exif cannot be written (RuntimeError: nobody thought of this): it is left out"
    ]


def test_the_photograph_of_a_phone_s_file_of_several_is_restored_as_jpeg(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    second = Image.new("RGB", (30, 20), "blue")
    Image.new("RGB", (30, 20), "red").save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second], exif=exif.tobytes()
    )
    with Image.open(tmp_path / "a.jpg") as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.kind == ".jpg"
    assert picture.colour.shape == (30, 20, 3)
    assert picture.colour[5, 5, 0] > 240 > 20 > picture.colour[5, 5, 2]
    assert of_status(restored(tmp_path / "a.jpg", tmp_path / "b.jpg")[1], "restored") == ["a.jpg"]
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.format == "JPEG"


@pytest.mark.parametrize("beside", [True, False])
def test_a_name_that_gets_too_long_is_of_one_picture(tmp_path, beside):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "n" * 247 + ".png", "z.png"):
        Image.new("RGB", (9, 12)).save(folder / name)
    found, outcomes = restored(folder, None if beside else tmp_path / "out", suffix=None if beside else "_restored")
    assert of_status(outcomes, "restored") == ["a.png", "z.png"]
    (failed,) = [problem for _, problem in found.failed] + [each.problem for each in outcomes if each.problem]
    assert "nnn" in failed
    assert "File name too long" in failed


def test_a_folder_whose_files_cannot_be_reached_does_not_stop_the_others(tmp_path, monkeypatch):
    """As a folder that may be listed and not entered (mode r--), for the superuser too."""
    (tmp_path / "in" / "closed").mkdir(parents=True)
    for name in ("a.png", "closed/b.png", "closed/c.heic", "closed/d_restored.png", "z.png"):
        Image.new("RGB", (9, 12)).save(tmp_path / "in" / name, "PNG")
    real = os.stat

    def stat(path, *more, **options):
        if isinstance(path, str | os.PathLike) and "closed/" in os.fspath(path):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return real(path, *more, **options)

    monkeypatch.setattr(os, "stat", stat)
    found, outcomes = restored(tmp_path / "in", None)
    assert of_status(outcomes, "restored") == ["a.png", "z.png"]
    assert "c.heic: Permission denied" in " ".join(problem for _, problem in found.failed)
    told = found.failed + [(each.source, each.problem) for each in outcomes if each.problem]
    assert sorted(path.name for path, _ in told) == ["b.png", "c.heic", "d_restored.png"]


def test_a_bitmap_beside_its_namesake_has_the_suffix_and_is_known_again(tmp_path):
    for name in ("x.bmp", "x.png"):
        Image.new("RGB", (9, 12)).save(tmp_path / name)
    for _ in range(2):
        jobs = find_jobs([str(tmp_path)], None).jobs
        assert [job.target.name for job in jobs] == ["x.bmp_restored.png", "x_restored.png"]
        restore_files(Restorer(Known(), 64), jobs, How(overwrite=True), on_done=lambda outcome: None)
    jobs = find_jobs([str(tmp_path)], tmp_path / "out").jobs
    assert "x.bmp.png" in [job.target.name for job in jobs]
