"""Shards that other programs made: every picture once, under a key of its own, and no blurry one as a truth."""

import io
import json
import os
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset as wds

from data.errors import DataError
from data.formats import is_junk
from data.image import decode_image, encode_jpeg, encode_png
from data.shards.index import index_folder
from data.shards.names import Naming, given_roles, samples_of
from data.shards.set import ShardSet
from data.shards.tar import Member
from data.stream.pairs import Sources
from tests.data.pictures import picture

JPG = encode_jpeg(picture(0))


def pack(path, members) -> None:
    """Write a tar of (name, bytes); names may repeat."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def png(number: int, side: int = 64) -> bytes:
    return encode_png(picture(number, side, side))


def indexed(root, members, **options) -> ShardSet:
    """The set of one tar with these members."""
    root.mkdir(exist_ok=True)
    pack(root / "a.tar", members)
    index_folder(root, **options)
    return ShardSet(root)


def keys_of(shards: ShardSet) -> list[str]:
    return [shards.key(number) for number in range(len(shards))]


PAIRS = {
    "extension": ("x.input.png", "x.target.png"),
    "capitals": ("X.LQ.PNG", "X.GT.PNG"),
    "jpeg beside png": ("x.blur.jpg", "x.sharp.png"),
    "folder": ("set/blur/x.png", "set/sharp/x.png"),
    "folder above": ("input/a/x.png", "target/a/x.png"),
    "end of the name": ("x_blur.png", "x_sharp.png"),
    "beginning of the name": ("lr-0001.png", "hr-0001.png"),
    "dots in the key": ("my.photo.blurry.png", "my.photo.sharp.png"),
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("order", [1, -1])
def test_a_blurry_picture_is_never_a_truth(tmp_path, kind, order):
    blurry, sharp = PAIRS[kind]
    encode = {name: encode_jpeg if name.endswith("jpg") else encode_png for name in (blurry, sharp)}
    members = [(blurry, encode[blurry](picture(1))), (sharp, encode[sharp](picture(2))), ("x.json", b"{}")]
    shards = indexed(tmp_path / "set", members[::order])
    assert (shards.kind, len(shards)) == ("pairs", 1)
    truth, input_ = Sources([shards]).photograph(0, 0)
    assert np.array_equal(truth, decode_image(encode[sharp](picture(2))))
    assert np.array_equal(input_, decode_image(encode[blurry](picture(1))))


def test_roles_are_asked_for_where_names_do_not_say_them(tmp_path):
    members = [("x.before.png", png(1)), ("x.after.png", png(2)), ("x.mask.png", png(3))]
    with pytest.raises(DataError, match=r"x.before.png, x.after.png, x.mask.png: one sample, or photographs each"):
        indexed(tmp_path / "set", members)
    naming = Naming(given_roles("before=blurry, after=sharp,mask=skip"))
    shards = indexed(tmp_path / "set", members, naming=naming)
    truth, input_ = Sources([shards]).photograph(0, 0)
    assert np.array_equal(truth, picture(2))
    assert np.array_equal(input_, picture(1))
    with pytest.raises(DataError, match="NAME=ROLE"):
        given_roles("before=blur")


def test_a_plain_picture_beside_another_is_not_guessed(tmp_path):
    for other in ("x.mask.png", "x.blur.png", "x.png"):
        with pytest.raises(DataError, match=r"which is the photograph|one sample|without its sharp one"):
            indexed(tmp_path / "set", [("x.jpg", JPG), (other, png(1))])
    shards = indexed(tmp_path / "set", [("x.jpg", JPG), ("x.mask.png", png(1))], naming=Naming({"mask": "skip"}))
    assert keys_of(shards) == ["x"]
    shards = indexed(
        tmp_path / "set", [("x.jpg", JPG), ("x.blur.png", png(1))], naming=Naming({"jpg": "sharp"}), overwrite=True
    )
    assert shards.kind == "pairs"


def test_blurry_pictures_alone_are_refused(tmp_path):
    for name in ("x.blur.png", "blur/x.png", "x_lq.png"):
        with pytest.raises(DataError, match="without its sharp one"):
            indexed(tmp_path / "set", [(name, JPG)])


def test_a_name_that_holds_such_a_word_is_asked_for_or_a_photograph(tmp_path):
    names = ["motion_blur.png", "blur-of-lights.png", "sharp/one.png", "a_sharp.png", "two.png"]
    members = [(name, png(number)) for number, name in enumerate(names)]
    with pytest.raises(DataError, match=r"2 samples .*motion_blur\.png: a blurry picture without"):
        indexed(tmp_path / "set", members)
    shards = indexed(tmp_path / "set", members, naming=Naming(given_roles("blur=none")))
    assert keys_of(shards) == ["motion_blur", "blur-of-lights", "sharp/one", "a_sharp", "two"]
    assert shards.kind == "sharp"


RELEASED = {
    "two words": ("x_blur_gamma.png", "x_ground_truth.png"),
    "the word alone": ("s1/blurry.png", "s1/sharp.png"),
    "REDS": ("train/train_blur/000/00000000.png", "train/train_sharp/000/00000000.png"),
    "DPDD": ("train_c/source/1P0A0896.png", "train_c/target/1P0A0896.png"),
    "RSBlur": ("0001/real_blur/real_blur.png", "0001/gt/gt_sharp.png"),
    "RealBlur": ("scene001/blur/blur_1.png", "scene001/gt/gt_1.png"),
    "spaces": ("x blur.png", "x sharp.png"),
    "Windows": ("set\\blur\\x.png", "set\\sharp\\x.png"),
    "GoPro": ("train/GOPR0372_07_00/blur/000047.png", "train/GOPR0372_07_00/sharp/000047.png"),
}


@pytest.mark.parametrize("kind", RELEASED)
def test_data_sets_as_released_are_pairs(tmp_path, kind):
    blurry, sharp = RELEASED[kind]
    shards = indexed(tmp_path / "set", [(sharp, png(2)), (blurry, png(1))])
    assert (shards.kind, len(shards)) == ("pairs", 1)
    truth, input_ = Sources([shards]).photograph(0, 0)
    assert np.array_equal(truth, picture(2))
    assert np.array_equal(input_, picture(1))


NOT_GUESSED = {
    "HIDE": ["train/1.png", "GT/1.png"],
    "numbered words": ["x.input1.png", "x.target1.png"],
    "images": ["x.img0.png", "x.img1.png"],
    "two blurry ones": ["s/blur/1.png", "s/blur_gamma/1.png", "s/sharp/1.png"],
    "two blurry ones, other order": ["s/blur_gamma/1.png", "s/sharp/1.png", "s/blur/1.png"],
    "blurry beside others": ["a_blur.png", "b_blur.png", "logo.png"],
}


@pytest.mark.parametrize("kind", NOT_GUESSED)
def test_what_may_be_a_pair_is_asked_for(tmp_path, kind):
    members = [(name, png(number)) for number, name in enumerate(NOT_GUESSED[kind])]
    with pytest.raises(DataError, match="--roles"):
        indexed(tmp_path / "set", members)


def test_pictures_of_different_pairs_are_never_paired(tmp_path):
    members = [
        (name, png(number)) for number, name in enumerate(["blur/x.png", "x.target.png", "x.input.png", "sharp/x.png"])
    ]
    shards = indexed(tmp_path / "set", members)
    found = [[int(picture_number(each)) for each in Sources([shards]).photograph(0, n)] for n in range(2)]
    assert found == [[3, 0], [1, 2]]
    members = [(name, png(n)) for n, name in enumerate(["x.input.png", "x.input.png", "x.target.png", "x.target.png"])]
    shards = indexed(tmp_path / "again", members)
    found = [[int(picture_number(each)) for each in Sources([shards]).photograph(0, n)] for n in range(2)]
    assert found == [[2, 0], [3, 1]]


def picture_number(image: np.ndarray) -> int:
    return next(number for number in range(9) if np.array_equal(image, picture(number)))


def test_a_blurry_shard_beside_a_sharp_one_is_no_set_of_photographs(tmp_path):
    for name in ("blur", "sharp"):
        pack(tmp_path / f"{name}.tar", [("1.png", png(1))])
    with pytest.raises(DataError, match="the shard's name says blurry"):
        index_folder(tmp_path)


def test_pairs_are_not_added_to_photographs_and_roles_are_kept(tmp_path):
    pack(tmp_path / "a.tar", [("1.png", png(1))])
    index_folder(tmp_path)
    pack(tmp_path / "b.tar", [("x.input.png", png(1)), ("x.target.png", png(2))])
    with pytest.raises(DataError, match="keep them in two folders"):
        index_folder(tmp_path, add=True)
    other = tmp_path / "other"
    other.mkdir()
    pack(other / "a.tar", [("x.1.png", png(1)), ("x.2.png", png(2))])
    index_folder(other, naming=Naming(given_roles("1=blurry,2=sharp")))
    pack(other / "b.tar", [("y.1.png", png(3)), ("y.2.png", png(4))])
    assert index_folder(other, add=True).pairs == 2


def test_the_way_out_works_for_frames_of_two_kinds(tmp_path):
    members = [("clip.0001.jpg", JPG), ("clip.0001.png", png(1))]
    with pytest.raises(DataError, match="which is the photograph"):
        indexed(tmp_path / "set", members)
    assert indexed(tmp_path / "set", members, naming=Naming(given_roles("jpg=sharp,png=blurry"))).kind == "pairs"


def test_joined_tars_and_shards_in_folders_are_told(tmp_path):
    for name in ("a", "b"):
        pack(tmp_path / f"{name}.tar", [(f"{name}.png", png(1))])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    with pytest.raises(DataError, match="goes on after its end"):
        index_folder(tmp_path)
    (tmp_path / "a.tar").unlink()
    (tmp_path / "b.tar").rename(tmp_path / "B.TAR")
    assert index_folder(tmp_path).samples == 1
    (tmp_path / "inner").mkdir()
    pack(tmp_path / "inner" / "c.tar", [("c.png", png(1))])
    with pytest.raises(DataError, match="has shards in folders"):
        index_folder(tmp_path, overwrite=True)


def test_sizes_that_no_picture_has_are_bad_without_decoding_too(tmp_path):
    header = bytearray(png(1))
    header[16:24] = (0).to_bytes(4, "big") + (5).to_bytes(4, "big")
    pack(tmp_path / "a.tar", [("good.png", png(1)), ("bad.png", bytes(header))])
    found = index_folder(tmp_path, decode=False, skip_bad=True)
    assert (found.samples, len(found.bad)) == (1, 1)
    assert len(ShardSet(tmp_path)) == 1


def test_nothing_is_lost_and_nothing_merged(tmp_path):
    names = ["a/n0.png", "b/n0.png", "clip.0000.png", "clip.0001.png", "IMG 2020.01.02-x.PNG", "Ü/é.png", "n0.png"]
    names += ["n0.png", "./c/n0.png"]
    members = [(name, png(number)) for number, name in enumerate(names)]
    shards = indexed(tmp_path / "set", members)
    wanted = ["a/n0", "b/n0", "clip.0000", "clip.0001", "IMG 2020.01.02-x", "Ü/é", "n0", "n0~2", "c/n0"]
    assert sorted(keys_of(shards)) == sorted(wanted)
    for number, key in enumerate(keys_of(shards)):
        assert np.array_equal(Sources([shards]).photograph(0, number)[0], picture(wanted.index(key)))


def test_members_of_a_sample_need_not_stand_together(tmp_path):
    names = ["b.png", "a.png", "b.json", "c.jpg", "a.json", "a.txt", "d.json"]
    shards = indexed(tmp_path / "set", [(name, png(1) if "png" in name else JPG) for name in names])
    assert keys_of(shards) == ["b", "a", "c"]
    assert [sorted(shards.extensions(number)) for number in range(3)] == [
        ["json", "png"],
        ["json", "png", "txt"],
        ["jpg"],
    ]


def test_equal_keys_in_two_shards_stay_apart_and_the_first_keeps_its_name(tmp_path):
    for name, number in (("a", 0), ("b", 1), ("c", 2)):
        pack(tmp_path / f"{name}.tar", [("x.png", png(number)), ("y.png", png(number + 7))])
    index_folder(tmp_path)
    assert keys_of(ShardSet(tmp_path)) == ["x", "y", "b/x", "b/y", "c/x", "c/y"]


def test_shards_are_added_without_a_change_to_the_others(tmp_path):
    pack(tmp_path / "m.tar", [("x.png", png(0))])
    index_folder(tmp_path, naming=Naming({"png": "sharp"}))
    before = ShardSet(tmp_path).shards[0]
    pack(tmp_path / "a.tar", [("x.png", png(1))])
    with pytest.raises(DataError, match="--add takes in"):
        index_folder(tmp_path)
    assert index_folder(tmp_path, add=True).samples == 2
    shards = ShardSet(tmp_path)
    assert keys_of(shards) == ["x", "a/x"]
    assert shards.shards[0].sha256 == before.sha256
    with pytest.raises(DataError, match="in the index already"):
        index_folder(tmp_path, add=True)


def test_bad_pictures_are_all_named_and_can_be_left_out(tmp_path):
    half = encode_jpeg(picture(0, 128, 128))[:900]
    members = [("good.png", png(1)), ("cut.jpg", half), ("text.png", b"no picture"), ("empty.jpg", b"")]
    with pytest.raises(DataError, match=r"3 samples .*--skip-bad") as caught:
        indexed(tmp_path / "set", members)
    assert ["cut.jpg" in caught.value.details[0], "text.png" in caught.value.details[1]] == [True, True]
    assert "empty.jpg" in caught.value.details[2]
    pack(tmp_path / "set" / "a.tar", members)
    found = index_folder(tmp_path / "set", skip_bad=True)
    assert (found.samples, len(found.bad)) == (1, 3)
    shards = ShardSet(tmp_path / "set")
    assert keys_of(shards) == ["good"]
    assert len(shards.info["left_out"]["bad"]) == 3


def test_among_pairs_a_picture_alone_is_bad(tmp_path):
    members = [("x.input.png", png(1)), ("x.target.png", png(2)), ("y.png", png(3)), ("z.input.png", png(4))]
    with pytest.raises(DataError, match="2 samples") as caught:
        indexed(tmp_path / "set", members)
    assert "z.input.png: a blurry picture without its sharp one" in caught.value.details[0]
    assert "y.png: a picture without its partner" in caught.value.details[1]
    assert keys_of(indexed(tmp_path / "set", members, skip_bad=True)) == ["x"]


def test_small_pictures_are_left_out_and_counted(tmp_path):
    pack(tmp_path / "a.tar", [("one.png", png(1, 8)), ("x.png", png(2))])
    found = index_folder(tmp_path, min_size=32)
    assert (found.samples, len(found.small)) == (1, 1)
    with pytest.raises(DataError, match="no pictures in its tars"):
        index_folder(tmp_path, min_size=500, overwrite=True)


def test_what_systems_leave_behind_is_no_sample(tmp_path):
    junk = [
        "._x.png",
        "__MACOSX/x.png",
        ".ipynb_checkpoints/x-checkpoint.png",
        "Thumbs.db",
        ".DS_Store",
        "d/@eaDir/x.png",
    ]
    assert all(map(is_junk, junk))
    shards = indexed(tmp_path / "set", [("x.png", png(1)), *((name, b"?") for name in junk)])
    assert keys_of(shards) == ["x"]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_compressed_shards_are_refused_by_name(tmp_path, name):
    with tarfile.open(tmp_path / name, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x.txt"))
    with pytest.raises(DataError, match=f"(?s){name}.*unpack"):
        index_folder(tmp_path)


def test_an_empty_tar_is_no_set(tmp_path):
    pack(tmp_path / "a.tar", [])
    with pytest.raises(DataError, match="no pictures in its tars"):
        index_folder(tmp_path)


def test_a_tar_that_is_not_whole_is_refused_wherever_it_ends(tmp_path):
    pack(tmp_path / "a.tar", [(f"{n}.png", png(n)) for n in range(3)])
    whole = (tmp_path / "a.tar").read_bytes()
    members = sorted(int(row[0]) for row in _rows(tmp_path))
    (tmp_path / "index.json").unlink()
    for cut in (0, 100, members[1] - 512, members[1] - 100, members[1] + 5, members[2] - 512):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match="not a whole tar"):
            index_folder(tmp_path)
    damaged = bytearray(whole)
    damaged[members[1] - 500] ^= 1  # in a header: tarfile would drop all that follows
    (tmp_path / "a.tar").write_bytes(damaged)
    with pytest.raises(DataError, match="after 1 members"):
        index_folder(tmp_path)


def _rows(root):
    index_folder(root)
    return ShardSet(root).shards[0].members["png"]


def test_folders_and_links_as_tar_packs_them(tmp_path):
    source, root = tmp_path / "source", tmp_path / "set"
    (source / "d").mkdir(parents=True)
    (source / "d" / "x.png").write_bytes(png(1))
    os.link(source / "d" / "x.png", source / "hard.png")
    os.symlink("d/x.png", source / "soft.png")
    root.mkdir()
    subprocess.run(["tar", "cf", root / "a.tar", "-C", source, "."], check=True)
    index_folder(root)
    shards = ShardSet(root)
    assert sorted(keys_of(shards)) == ["d/x", "hard", "soft"]
    assert all(shards.read(number, "png") == png(1) for number in range(3))


def test_webdatasets_writer_img2dataset_and_hugging_face(tmp_path):
    with wds.TarWriter(str(tmp_path / "w-000.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"Some Dir/N-{number}", "jpg": JPG, "cls": 3})
    pack(
        tmp_path / "00000.tar",
        [(f"00000000{n}.{ext}", JPG if ext == "jpg" else b"{}") for n in range(2) for ext in ("jpg", "json", "txt")],
    )
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    pack(
        tmp_path / "train-00000-of-00002.tar",
        [(f"images/{n}.{ext}", JPG if ext == "jpeg" else b"{}") for n in range(2) for ext in ("jpeg", "metadata.json")],
    )
    found = index_folder(tmp_path)
    assert (found.samples, found.shards, found.others) == (7, 3, 0)


def test_index_of_our_own_shards_is_what_was_written(make_set):
    root = make_set([3, 2], kind="pairs")
    before = json.loads((root / "index.json").read_text())["shards"]
    (root / "index.json").unlink()
    index_folder(root)
    assert json.loads((root / "index.json").read_text())["shards"] == before
    with pytest.raises(DataError, match="exists"):
        index_folder(root)
    shutil.rmtree(root)
    with pytest.raises(DataError, match="no such folder"):
        index_folder(root)


def test_names_that_cannot_be_printed_are_escaped(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", errors="surrogateescape") as tar:
        for name in ("bad\udcff.png", "line\nbreak.png"):
            entry = tarfile.TarInfo(name)
            entry.size = len(JPG)
            tar.addfile(entry, io.BytesIO(JPG))
    index_folder(tmp_path)
    assert keys_of(ShardSet(tmp_path)) == ["bad\\udcff", "line\\nbreak"]


def test_json_of_a_group_stays_with_its_picture():
    names = ["x.image.png", "x.json", "clip.0001.png", "clip.0001.json", "clip.0002.png", "clip.json"]
    found, left = samples_of([Member(name, 0, 0) for name in names], Naming())
    assert {sample.key: sorted(sample.members) for sample in found} == {
        "x.image": ["json", "png"],
        "clip.0001": ["json", "png"],
        "clip.0002": ["png"],
    }
    assert left == 1
