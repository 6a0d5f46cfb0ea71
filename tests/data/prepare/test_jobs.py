"""Prepare: what goes in comes out, whole and the same after any kill; bad sources are named; no more is touched."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.image import decode_image, encode_jpeg, encode_png
from data.prepare.jobs import prepare, prepare_dataset
from data.prepare.layouts import images_in, list_dataset
from data.prepare.recipe import Recipe, tile_boxes
from data.prepare.windows import Windows
from data.shards.set import ShardSet
from data.shards.verify import verify
from tests.data.pictures import picture

pytestmark = pytest.mark.slow


@pytest.fixture
def photographs(tmp_path):
    """A folder of 12 photographs, PNG and JPEG, most of 96×80."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(12):
        image = picture(number, 96, 80)
        data = encode_jpeg(image) if number % 2 else encode_png(image)
        (root / f"p{number:02d}.{'jpg' if number % 2 else 'png'}").write_bytes(data)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir()) if path.is_file()}


SMALL_SHARDS = Recipe(shard_bytes=3_000)


def test_photographs_are_kept_byte_for_byte(photographs, tmp_path):
    done = prepare_dataset("folder", photographs, tmp_path / "set")
    assert (done.samples, done.shards, done.bad, done.small) == (12, 1, [], [])
    shards = ShardSet(tmp_path / "set")
    for number, path in enumerate(sorted(photographs.iterdir())):
        assert shards.read(number, shards.image_member(number)) == path.read_bytes()
    assert verify(tmp_path / "set") == []


def test_large_photographs_are_cut_into_equal_tiles(photographs, tmp_path):
    prepare_dataset("folder", photographs, tmp_path / "set", Recipe(tile=50, png=True))
    shards = ShardSet(tmp_path / "set")
    assert len(shards) == 12 * 4
    assert {shards.size(number) for number in range(len(shards))} == {(48, 40)}
    rows = [[decode_image(shards.read(2 * row + column, "png")) for column in (0, 1)] for row in (0, 1)]
    np.testing.assert_array_equal(np.vstack([np.hstack(row) for row in rows]), picture(0, 96, 80))
    assert json.loads(shards.read(3, "json")) == {"box": [48, 40, 48, 40], "source": "p00.png"}


@pytest.mark.parametrize(("height", "width", "tile"), [(720, 1280, 768), (1, 1, 1), (769, 768, 768), (3000, 4001, 700)])
def test_tiles_cover_the_image_and_are_large_enough_to_crop(height, width, tile):
    seen = np.zeros((height, width), int)
    for top, left, rows, columns in tile_boxes(height, width, tile):
        assert min(height, tile * 2 // 3) <= rows <= tile
        assert min(width, tile * 2 // 3) <= columns <= tile
        seen[top : top + rows, left : left + columns] += 1
    assert (seen >= 1).all()
    assert seen.mean() < 1.8


def test_workers_and_order_of_finishing_change_nothing(photographs, tmp_path):
    one = prepare_dataset("folder", photographs, tmp_path / "one", SMALL_SHARDS)
    prepare_dataset("folder", photographs, tmp_path / "two", SMALL_SHARDS, workers=3)
    assert one.shards > 3
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


PREPARE = """
import sys
from data.prepare import recipe
from data.prepare.jobs import prepare_dataset
from data.prepare.recipe import Recipe
import time
slow = recipe.decode_image
def decode(data, where):
    time.sleep(0.05)
    return slow(data, where)
recipe.decode_image = decode
prepare_dataset("folder", sys.argv[1], sys.argv[2], Recipe(shard_bytes=3_000), workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_nine_and_rerun_gives_the_shards_of_an_unbroken_run(photographs, tmp_path, workers):
    prepare_dataset("folder", photographs, tmp_path / "unbroken", SMALL_SHARDS)
    out = tmp_path / "killed"
    command = [sys.executable, "-c", PREPARE, str(photographs), str(out), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((out / ".records").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "index.json").exists()
    (out / "shard_00001_000.tar.123.tmp").write_bytes(b"left by the killed writer")
    with pytest.raises(DataError, match="index"):
        ShardSet(out)
    done = prepare_dataset("folder", photographs, out, SMALL_SHARDS)
    assert done.reused_jobs >= 1
    assert contents(out) == contents(tmp_path / "unbroken")
    assert verify(out) == []


def test_torn_shard_of_a_killed_run_is_made_again(photographs, tmp_path):
    prepare_dataset("folder", photographs, tmp_path / "unbroken", SMALL_SHARDS)
    out = tmp_path / "set"
    (photographs / "p05.jpg").rename(tmp_path / "aside")
    (photographs / "p05.jpg").write_bytes(bytes((tmp_path / "aside").stat().st_size))
    with pytest.raises(DataError, match=r"1 of 12 sources are bad.*p05\.jpg"):
        prepare_dataset("folder", photographs, out, SMALL_SHARDS)
    (photographs / "p05.jpg").unlink()
    (tmp_path / "aside").rename(photographs / "p05.jpg")
    first = sorted(out.glob("*.tar"))[0]
    os.truncate(first, first.stat().st_size - 1)
    done = prepare_dataset("folder", photographs, out, SMALL_SHARDS)
    assert 0 < done.reused_jobs < done.shards - 1
    assert contents(out) == contents(tmp_path / "unbroken")


def test_bad_sources_below_the_limit_are_left_out_and_listed(photographs, tmp_path):
    (photographs / "p03.jpg").write_bytes((photographs / "p03.jpg").read_bytes()[:500])
    done = prepare_dataset("folder", photographs, tmp_path / "set", max_bad_fraction=0.1)
    assert done.samples == 11
    assert "p03.jpg" in done.bad[0]
    assert "p03.jpg" in json.loads((tmp_path / "set" / "manifest.json").read_text())["bad"][0]


def test_small_photographs_are_left_out_and_listed(photographs, tmp_path):
    (photographs / "tiny.png").write_bytes(encode_png(picture(1, 40, 200)))
    done = prepare_dataset("folder", photographs, tmp_path / "set", Recipe(min_size=64))
    assert done.small == ["tiny.png"]
    assert done.samples == 12
    with pytest.raises(DataError, match="13 smaller than min_size 999"):
        prepare_dataset("folder", photographs, tmp_path / "none", Recipe(min_size=999))


def test_finished_sets_are_not_written_over_by_accident(photographs, tmp_path):
    out = tmp_path / "set"
    prepare_dataset("folder", photographs, out, SMALL_SHARDS)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(DataError, match="this very set"):
        prepare_dataset("folder", photographs, out, SMALL_SHARDS)
    with pytest.raises(DataError, match="another shard set"):
        prepare_dataset("folder", photographs, out, Recipe(tile=48))
    assert contents(out) == before
    prepare_dataset("folder", photographs, out, Recipe(tile=48), prefix="new", overwrite=True)
    assert verify(out) == []
    assert (out / "notes.txt").read_text() == "mine"


def test_two_writers_in_one_folder_are_refused(photographs, tmp_path):
    import fcntl

    out = tmp_path / "set"
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another `sharpprior prepare`"):
            prepare_dataset("folder", photographs, out)


def test_unwritable_folder_is_one_clear_line(photographs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        prepare_dataset("folder", photographs, tmp_path / "file" / "set")


def test_full_disk_is_one_clear_line_and_nothing_is_lost(photographs, tmp_path, monkeypatch):
    import errno

    from data.prepare import jobs as module

    whole = module.write_shard

    def full(path, samples):
        if path.name == "shard_00002_000.tar":
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, samples)

    monkeypatch.setattr(module, "write_shard", full)
    with pytest.raises(DataError, match="No space left on device; free space"):
        prepare_dataset("folder", photographs, tmp_path / "set", SMALL_SHARDS)
    monkeypatch.undo()
    assert prepare_dataset("folder", photographs, tmp_path / "set", SMALL_SHARDS).reused_jobs == 2


def gopro(root: Path, frames: int = 2) -> None:
    for sequence in ("GOPR0372_07_00", "GOPR0372_07_01"):
        for kind, shift in (("blur", 1), ("sharp", 0)):
            folder = root / "train" / sequence / kind
            folder.mkdir(parents=True)
            for number in range(frames):
                (folder / f"{number:06d}.png").write_bytes(encode_png(picture(number + 7 * shift, 72, 128)))


def test_released_pairs_become_pairs_with_licence_hashes_and_split(tmp_path):
    gopro(tmp_path / "GOPRO_Large")
    prepare_dataset("gopro", tmp_path / "GOPRO_Large", tmp_path / "set", split="train", partial=True)
    shards = ShardSet(tmp_path / "set")
    assert (shards.kind, len(shards)) == ("pairs", 4)
    for number, pair in enumerate(list_dataset("gopro", tmp_path / "GOPRO_Large", partial=True)):
        assert shards.read(number, "blurry.png") == pair.blurry.read_bytes()
        assert shards.read(number, "sharp.png") == pair.sharp.read_bytes()
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["licence"] == "CC BY 4.0"
    assert (manifest["dataset"], manifest["split"], manifest["variant"]) == ("gopro", "train", "blur")
    import hashlib

    assert len(manifest["sources"]) == 8
    for name, size, digest in manifest["sources"]:
        data = (tmp_path / "GOPRO_Large" / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)


def test_pairs_are_tiled_in_step_and_losslessly(tmp_path):
    gopro(tmp_path / "g", frames=1)
    prepare_dataset("gopro", tmp_path / "g", tmp_path / "set", Recipe(tile=64), partial=True)
    shards = ShardSet(tmp_path / "set")
    assert len(shards) == 2 * 4
    np.testing.assert_array_equal(decode_image(shards.read(1, "blurry.png")), picture(7, 72, 128)[:42, 64:])
    np.testing.assert_array_equal(decode_image(shards.read(1, "sharp.png")), picture(0, 72, 128)[:42, 64:])


def test_sharp_only_makes_photographs_of_pairs(tmp_path):
    gopro(tmp_path / "g")
    prepare_dataset("gopro", tmp_path / "g", tmp_path / "set", Recipe(sharp_only=True), partial=True)
    shards = ShardSet(tmp_path / "set")
    assert shards.kind == "sharp"
    np.testing.assert_array_equal(decode_image(shards.read(1, "png")), picture(1, 72, 128))


def test_pair_of_two_sizes_is_bad(tmp_path):
    gopro(tmp_path / "g")
    path = tmp_path / "g/train/GOPR0372_07_00/blur/000001.png"
    path.write_bytes(encode_png(picture(1, 72, 120)))
    with pytest.raises(DataError, match=r"000001\.png: \(72, 120\) px, its sharp partner \(72, 128\)"):
        prepare_dataset("gopro", tmp_path / "g", tmp_path / "set", partial=True)


def test_progress_counts_every_source(photographs, tmp_path):
    seen = []
    prepare_dataset("folder", photographs, tmp_path / "set", SMALL_SHARDS, progress=lambda *step: seen.append(step))
    assert seen[-1] == (12, 12)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("options", [{"workers": 0}, {"prefix": "A"}, {"prefix": ""}])
def test_options_out_of_range_are_refused(photographs, tmp_path, options):
    with pytest.raises(DataError, match="workers"):
        prepare_dataset("folder", photographs, tmp_path / "set", **options)
    with pytest.raises(DataError, match="nothing to prepare"):
        prepare([], photographs, tmp_path / "set")


def test_ctrl_c_stops_the_workers_and_a_rerun_goes_on(photographs, tmp_path):
    for attempt in range(5):  # a busy machine may look at the records only when all is done
        out = tmp_path / f"set{attempt}"
        status, err = interrupted(photographs, out)
        if status:
            break
    assert status != 0
    assert "KeyboardInterrupt" in err
    prepare_dataset("folder", photographs, out, SMALL_SHARDS)
    assert verify(out) == []


def interrupted(photographs: Path, out: Path) -> tuple[int, str]:
    """(status, stderr) of a preparation that gets Ctrl-C, with its workers, once it has begun."""
    command = [sys.executable, "-c", PREPARE, str(photographs), str(out), "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((out / ".records").glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=180)
    return process.returncode, err


def few(root: Path) -> Path:
    """A folder of two photographs."""
    root.mkdir()
    for number in range(2):
        (root / f"{root.name}{number}.png").write_bytes(encode_png(picture(number, 40, 50)))
    return root


def test_overwrite_never_touches_what_prepare_did_not_make(tmp_path):
    few(tmp_path / "photos")
    for number, (name, content) in enumerate(
        (("index.json", '{"shards": [{"name": "precious.tar"}]}'), ("manifest.json", '{"mine": 1}'))
    ):
        out = tmp_path / f"out{number}"
        out.mkdir()
        (out / "precious.tar").write_bytes(b"mine")
        (out / name).write_text(content)
        for overwrite in (False, True):
            with pytest.raises(DataError, match="prepare did not make"):
                prepare_dataset("folder", tmp_path / "photos", out, overwrite=overwrite)
        assert (out / "precious.tar").read_bytes() == b"mine"
        assert (out / name).read_text() == content


def test_an_unfinished_set_of_other_sources_is_not_cleared(tmp_path):
    few(tmp_path / "one")
    few(tmp_path / "two")
    out = tmp_path / "out"
    prepare_dataset("folder", tmp_path / "one", out)
    for name in ("index.json", "manifest.json"):  # as a kill before the last two writes leaves it
        (out / name).unlink()
    (out / ".records").mkdir()
    (out / ".records" / "begun").write_text(json.dumps({"identity": "from the folder one"}))
    before = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    with pytest.raises(DataError, match="unfinished set of other sources"):
        prepare_dataset("folder", tmp_path / "two", out)
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == before
    prepare_dataset("folder", tmp_path / "two", out, overwrite=True)


def test_frames_are_taken_from_one_split_in_the_order_of_their_numbers(tmp_path):
    for split in ("train", "test"):
        sequence = tmp_path / "all" / split / "seq"
        sequence.mkdir(parents=True)
        for number in range(12):
            (sequence / f"frame{number}.png").write_bytes(encode_png(picture(0, 32, 32)))
    assert [path.name for path in images_in(sequence)] == [f"frame{number}.png" for number in range(12)]
    recipe = Recipe(windows=Windows(levels=(3,)))
    prepare_dataset("gopro", tmp_path / "all", tmp_path / "out", recipe)
    sources = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"]
    assert [name for name, *_ in sources] == ["seq"]  # of train/ alone
    for arguments, words in (
        ({"split": "tset"}, "split 'tset'; one of"),
        ({"variant": "blur"}, "leave it out"),
    ):
        with pytest.raises(DataError, match=words):
            prepare_dataset("gopro", tmp_path / "all", tmp_path / "o2", recipe, **arguments)
    with pytest.raises(DataError, match="unknown"):
        prepare_dataset("nonsense", tmp_path / "all", tmp_path / "o3", recipe)
    gopro(tmp_path / "pairs", frames=1)
    with pytest.raises(DataError, match="its frames are pairs"):
        prepare_dataset("gopro", tmp_path / "pairs", tmp_path / "o4", recipe)


def test_lossless_photographs_stay_lossless_and_turned_ones_too(tmp_path):
    root, image = tmp_path / "photos", picture(3, 96, 80)
    root.mkdir()
    for name in ("a.bmp", "b.tif", "c.webp"):
        Image.fromarray(image).save(root / name, **({"lossless": True} if name.endswith("webp") else {}))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(image).save(root / "d.jpg", quality=95, exif=exif)
    for tile in (0, 50):
        prepare_dataset("folder", root, tmp_path / f"set{tile}", Recipe(tile=tile))
    whole, tiles = ShardSet(tmp_path / "set0"), ShardSet(tmp_path / "set50")
    for number in range(3):
        assert np.array_equal(decode_image(whole.read(number, "png")), image)
    assert np.array_equal(decode_image(whole.read(3, "png")), decode_image((root / "d.jpg").read_bytes()))
    assert {tiles.image_member(number) for number in range(12)} == {"png"}
    assert {tiles.image_member(number) for number in range(12, len(tiles))} == {"jpg"}  # cut from a lossy one


def test_all_bad_sources_are_named_and_junk_is_counted(photographs, tmp_path):
    for name in ("bad1.png", "bad2.jpg"):
        (photographs / name).write_bytes(b"no picture")
    (photographs / "._p00.png").write_bytes(b"\x00")
    (photographs / "Thumbs.db").write_bytes(b"\x00")
    with pytest.raises(DataError, match=r"2 of 14 sources are bad.*bad1\.png") as caught:
        prepare_dataset("folder", photographs, tmp_path / "set")
    assert len(caught.value.details) == 2
    done = prepare_dataset("folder", photographs, tmp_path / "set", max_bad_fraction=0.5)
    assert (done.samples, len(done.bad), done.junk) == (12, 2, 2)
