"""Restoration of files: any kind, any depth, nothing lost."""

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from data.picture import upright_array
from tests.train.restore.known import Known
from train.restore.files import How, Outcome, restore_files
from train.restore.picture import Picture, PictureError, read_picture, write_picture
from train.restore.restorer import Restorer
from train.restore.sources import Found, find_jobs


def restored(source, target, network=None, suffix=None, on_tile=lambda *_: None, **how) -> tuple[Found, list[Outcome]]:
    """Restore what `source` names: what was found, and what became of it."""
    sources = source if isinstance(source, list) else [source]
    found, outcomes = find_jobs([str(each) for each in sources], target, suffix), []
    restorer = Restorer(network or Known(), 64)
    restore_files(restorer, found.jobs, How(**how), on_done=outcomes.append, on_tile=on_tile)
    return found, outcomes


def of_status(outcomes: list[Outcome], status: str) -> list[str]:
    return [each.source.name for each in outcomes if each.status == status]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_identity_network_gives_lossless_files_back_bit_for_bit(suffix, bits, channels, tmp_path):
    rng = np.random.Generator(np.random.Philox(bits + channels))
    kind = np.uint8 if bits == 8 else np.uint16
    array = rng.integers(0, 2**bits, (37, 53, channels), dtype=kind)
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    if bits == 8:
        Image.fromarray(array if channels > 1 else array[..., 0]).save(source)
    else:  # Pillow has no 16-bit colour
        assert cv2.imwrite(str(source), array if channels > 1 else array[..., 0])
    assert of_status(restored(source, target)[1], "restored") == [source.name]
    result = np.asarray(Image.open(target)) if bits == 8 else cv2.imread(str(target), cv2.IMREAD_UNCHANGED)
    assert result.dtype == kind
    np.testing.assert_array_equal(result.reshape(array.shape), array)


def test_the_cameras_orientation_profile_and_metadata_stay(tmp_path):
    array = np.zeros((20, 30, 3), np.uint8)
    array[:10, :15] = (250, 10, 10)  # red, top left as stored
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(array).save(source, exif=exif, icc_profile=b"a profile")
    restored(source, target, tile=None)
    with Image.open(target) as result:
        assert result.size == (20, 30)  # turned upright
        assert result.getpixel((15, 5)) == (250, 10, 10)  # top right now
        assert result.getexif()[0x0112] == 1
        assert result.getexif()[0x010F] == "camera"
        assert result.info["icc_profile"] == b"a profile"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_files_turn_as_8_bit_ones_do(orientation, tmp_path):
    array = np.random.Generator(np.random.Philox(3)).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(tmp_path / "8.tif", exif=exif)
    np.testing.assert_array_equal(upright_array(array, orientation), read_picture(tmp_path / "8.tif").colour)


def test_palette_grey_alpha_and_cmyk_files_are_read(tmp_path):
    rgb = Image.fromarray(np.random.Generator(np.random.Philox(1)).integers(0, 256, (8, 9, 3), dtype=np.uint8))
    for mode, suffix, alpha in (
        ("P", ".png", False),
        ("LA", ".png", True),
        ("CMYK", ".jpg", False),
        ("1", ".png", False),
    ):
        path = tmp_path / f"{mode}{suffix}"
        rgb.convert("L" if mode == "LA" else "RGB").convert(mode).save(path)
        picture = read_picture(path)
        assert picture.colour.shape == (8, 9, 1 if mode in ("LA", "1") else 3)
        assert (picture.alpha is not None) == alpha


def test_a_bad_file_in_a_folder_is_told_and_the_rest_go_on(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(folder / "a.png")
    (folder / "b.jpg").write_bytes(b"\xff\xd8 not a picture")
    whole = (folder / "a.png").read_bytes()
    (folder / "c.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(folder / "d.jpg")
    _, outcomes = restored(folder, out)
    assert of_status(outcomes, "restored") == ["a.png", "d.jpg"]
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "d.jpg"]
    told = {each.source.name: each.problem for each in outcomes}
    assert told["a.png"] is None
    assert "b.jpg" in told["b.jpg"]
    assert "decode" in told["c.png"]


def test_nothing_is_overwritten_unless_asked(tmp_path):
    picture = Picture(np.zeros((4, 4, 3), np.uint8))
    write_picture(tmp_path / "a.png", picture)
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(PictureError, match=r"a\.png: exists.*--overwrite"):
        write_picture(tmp_path / "a.png", Picture(np.ones((4, 4, 3), np.uint8)))
    assert (tmp_path / "a.png").read_bytes() == before
    write_picture(tmp_path / "a.png", Picture(np.ones((4, 4, 3), np.uint8)), overwrite=True)
    assert (tmp_path / "a.png").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("name", "words"), [("absent.png", "no such file"), ("text.png", "does not decode")])
def test_errors_name_the_file(name, words, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(PictureError, match=rf"{name}: {words}"):
        read_picture(tmp_path / name)
    with pytest.raises(PictureError, match=r"out\.xyz: unknown kind"):
        write_picture(tmp_path / "out.xyz", Picture(np.zeros((4, 4, 3), np.uint8)))


def test_tiffs_of_every_mode_are_written_as_tiffs_that_open(tmp_path):
    rgb = Image.fromarray(np.random.Generator(np.random.Philox(2)).integers(0, 256, (14, 9, 3), dtype=np.uint8))
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"):
        source, target = tmp_path / f"{mode}.tif", tmp_path / f"{mode}-out.tif"
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = 6, "camera"
        image = ImageCms.profileToProfile(rgb, *_lab()) if mode == "LAB" else rgb.convert(mode)
        # Pillow 12 does not read its own uncompressed YCbCr.
        image.save(source, exif=exif, compression="tiff_deflate" if mode == "YCbCr" else None)
        write_picture(target, read_picture(source))
        with Image.open(target) as result:
            result.load()
            assert result.size == (14, 9), mode
            assert result.getexif()[0x010F] == "camera"
            wanted = read_picture(source).colour.astype(int)
            assert np.abs(np.asarray(result.convert("RGB")) - wanted).max() <= 1, mode


def _lab():
    return ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), 0, "LAB"


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_files_keep_their_profile_and_maker(suffix, tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "camera"
    array = np.random.Generator(np.random.Philox(2)).integers(0, 65536, (7, 9, 3))
    picture = Picture(array.astype(np.uint16), icc=b"a profile", exif=exif.tobytes())
    write_picture(tmp_path / f"a{suffix}", picture)
    again = read_picture(tmp_path / f"a{suffix}")
    assert again.icc == b"a profile"
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert image.getexif()[0x010F].rstrip("\0") == "camera"
    assert again.colour.dtype == np.uint16
    np.testing.assert_array_equal(again.colour, array)


def test_a_rotated_16_bit_tiff_stays_16_bit(tmp_path):
    array = np.random.Generator(np.random.Philox(2)).integers(0, 65536, (7, 9, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", metadata=None, extratags=[(274, 3, 1, 6, True)])
    picture = read_picture(tmp_path / "a.tif")
    assert picture.colour.dtype == np.uint16
    np.testing.assert_array_equal(picture.colour, np.rot90(array, -1))


def test_a_colour_that_stands_for_transparency_becomes_alpha(tmp_path):
    rgb = np.zeros((4, 5, 3), np.uint8)
    rgb[0, 0] = (1, 2, 3)
    Image.fromarray(rgb).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png", transparency=1)
    for name, channels in (("rgb.png", 3), ("grey.png", 1)):
        picture = read_picture(tmp_path / name)
        assert picture.colour.shape[2] == channels
        assert picture.alpha[0, 0] == 0
        assert picture.alpha[1, 1] == 255


def test_what_would_be_lost_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "float.tif", np.random.Generator(np.random.Philox(1)).random((4, 5), np.float32))
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((4, 5), np.uint32))
    frames = [Image.new("RGB", (4, 5), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    for name, words in (("float.tif", "8 or 16 bits"), ("deep.tif", "8 or 16 bits"), ("pages.tif", "2 pages"),
                        ("moving.webp", "2 pages or frames")):  # fmt: skip
        with pytest.raises(PictureError, match=rf"{name}: .*{words}"):
            read_picture(tmp_path / name)


def test_two_pictures_of_a_folder_never_become_one_file(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a.bmp", ".hidden.png", "b.bmp"):
        Image.new("RGB", (4, 5)).save(tmp_path / "in" / name)
    _, outcomes = restored(tmp_path / "in", tmp_path / "out")
    assert len(of_status(outcomes, "restored")) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.bmp.png", "a.png", "b.png"]


def test_a_tree_is_kept_and_what_is_skipped_is_named(tmp_path):
    source, out = tmp_path / "in", tmp_path / "in" / "out"
    for name in ("a.png", "x/a.png", "x/y/b.jpg", "x/z.gif"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 5)).save(source / name)
    for name in ("x/notes.txt", "._a.png", "x/noname"):
        (source / name).write_bytes(b"?")
    for turn in (1, 2):
        found, outcomes = restored(source, out, skip_existing=turn == 2)
        assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == ["a.png", "x/a.png", "x/y/b.jpg"]
        assert [path.name for path in found.skipped] == ["noname", "z.gif"]
        assert [each.status for each in outcomes] == ["restored" if turn == 1 else "there"] * 3
    assert len(of_status(restored(source, out)[1], "failed")) == 3


def test_the_folder_of_a_target_is_made_and_tiles_are_told(tmp_path):
    Image.new("RGB", (200, 150)).save(tmp_path / "a.png")
    told = []
    restored(
        tmp_path / "a.png",
        tmp_path / "new" / "dir" / "b.png",
        on_tile=lambda path, done, every: told.append((path.name, done, every)),
    )
    assert (tmp_path / "new" / "dir" / "b.png").exists()
    assert told[0] == ("a.png", 1, len(told))
    assert told[-1][1] == len(told) > 4


def test_a_bad_target_is_told_before_any_work(tmp_path):
    network = Known()
    Image.new("RGB", (4, 5)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 5)).save(tmp_path / "b.png")
    told = [restored(tmp_path / "a.png", tmp_path / name, network)[1][0].problem for name in ("a.gif", "b.png")]
    assert "unknown kind" in told[0]
    assert "exists" in told[1]
    assert not network.sizes


def test_no_source_is_ever_overwritten(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 5), "red").save(tmp_path / name)
    (tmp_path / "hard.png").hardlink_to(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    for sources, target in (
        ([tmp_path / "a.png"], tmp_path / "a.png"),
        ([tmp_path / "a.png"], tmp_path / "hard.png"),
        ([tmp_path / "a.png", tmp_path / "b.png"], tmp_path),
    ):
        found, outcomes = restored(sources, target, Known(shift=-0.5), overwrite=True)
        assert not outcomes
        assert all("to be restored" in problem for _, problem in found.failed)
        assert len(found.failed) == len(sources)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() == before


def test_without_a_target_results_lie_beside_their_sources_and_are_no_sources_themselves(tmp_path):
    for name in ("a.png", "x/b.bmp", "x/c_restored.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 5)).save(tmp_path / name)
    for turn in (1, 2):
        _, outcomes = restored(tmp_path, None, skip_existing=turn == 2)
        names = sorted(str(each.target.relative_to(tmp_path)) for each in outcomes)
        # c_restored.png is nobody's result: there is no c.png.
        assert names == ["a_restored.png", "x/b_restored.png", "x/c_restored_restored.png"]
        assert {each.status for each in outcomes} == {"restored" if turn == 1 else "there"}
    _, outcomes = restored(tmp_path / "a.png", None, suffix="-sharp")
    assert outcomes[0].target == tmp_path / "a-sharp.png"


def test_several_names_patterns_and_folders_go_into_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.jpg", "trip/day/c.png", "trip/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("?") if name.endswith("txt") else Image.new("RGB", (4, 5)).save(tmp_path / name)
    _, outcomes = restored(["*.jpg", "a.png", "trip"], tmp_path / "out", suffix="_s")
    assert {each.status for each in outcomes} == {"restored"}
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert written == ["a_s.png", "b_s.jpg", "trip/day/c_s.png"]
    _, outcomes = restored(["trip/**/*.png"], tmp_path / "one")
    assert [each.target.name for each in outcomes] == ["c.png"]
    for names, words in (
        (["*.webp"], r"\*\.webp: fits no picture"),
        (["absent.png"], r"absent\.png: no such file"),
        (["-", "a.png"], "standard input is one picture"),
    ):
        with pytest.raises(PictureError, match=words):
            find_jobs(names, None)
    with pytest.raises(PictureError, match="give a folder"):
        find_jobs(["a.png", "b.jpg"], tmp_path / "a.png")


def test_two_pictures_of_one_name_are_told(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 5)).save(tmp_path / folder / "a.png")
    found, outcomes = restored([tmp_path / "x" / "a.png", tmp_path / "y" / "a.png"], tmp_path / "out")
    assert len(of_status(outcomes, "restored")) == 1
    assert "another picture" in found.failed[0][1]


def test_pictures_that_are_too_large_are_refused_before_they_are_decoded(tmp_path):
    Image.new("L", (3000, 2000)).save(tmp_path / "a.png")
    _, (outcome,) = restored(tmp_path / "a.png", tmp_path / "b.png", most=5_000_000)
    assert "3000×2000 px, more than 5 megapixels" in outcome.problem


def test_a_reader_and_a_writer_go_ahead_and_order_stays(tmp_path):
    for number in range(9):
        Image.new("RGB", (40 + number, 50)).save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_bytes(b"")
    _, outcomes = restored(tmp_path, tmp_path / "out")
    assert [each.source.name for each in outcomes] == [f"{number}.png" for number in range(9)]
    assert of_status(outcomes, "failed") == ["4.png"]
    assert outcomes[3].size == (43, 50)
    assert outcomes[3].seconds > 0
