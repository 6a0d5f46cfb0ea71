"""Shard sets: plain webdataset tars, an index that knows every byte, writes that leave nothing torn."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import webdataset as wds

from data.errors import DataError
from data.image import encode_jpeg, encode_png
from data.shards.set import ShardSet, digest_of_index
from data.shards.verify import verify
from data.shards.write import ShardWriter, write_index, write_shard
from tests.data.pictures import picture

JPG = encode_jpeg(picture(0))


def test_what_was_written_is_read_back(make_set):
    shards = ShardSet(make_set([3, 2]))
    assert len(shards) == 5
    assert [shards.locate(i) for i in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert shards.read(3, "jpg") == encode_jpeg(picture(3))
    assert shards.size(4) == (64, 64)
    assert shards.kind == "sharp"


def test_set_opens_by_its_index_file_too(make_set):
    root = make_set()
    assert ShardSet(root / "index.json").digest == ShardSet(str(root)).digest


def test_plain_webdataset_reads_the_same_bytes(make_set):
    root = make_set([3, 2], kind="pairs")
    urls = [str(path) for path in sorted(root.glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    shards = ShardSet(root)
    assert [sample["__key__"] for sample in samples] == [key for shard in shards.shards for key in shard.keys]
    for number, sample in enumerate(samples):
        assert sample["sharp.png"] == shards.read(number, "sharp.png")
        assert sample["blurry.png"] == shards.read(number, "blurry.png")


def test_equal_samples_give_equal_bytes_whatever_the_time(tmp_path):
    one = write_shard(tmp_path / "a.tar", [("k", {"jpg": JPG})])
    time.sleep(1.1)
    two = write_shard(tmp_path / "b.tar", [("k", {"jpg": JPG})])
    assert one["sha256"] == two["sha256"]


@pytest.mark.parametrize("key", ["", "A", "a.b", "a b", "a/b", "é", "x" * 81])
def test_bad_keys_are_refused(tmp_path, key):
    with pytest.raises(DataError, match="key"):
        write_shard(tmp_path / "a.tar", [(key, {"jpg": JPG})])
    assert list(tmp_path.iterdir()) == []


def test_repeated_keys_are_refused_inside_a_shard(tmp_path):
    with pytest.raises(DataError, match="'same' comes twice"):
        write_shard(tmp_path / "a.tar", [("same", {"jpg": JPG}), ("same", {"jpg": JPG})])
    assert list(tmp_path.iterdir()) == []


def test_repeated_keys_are_refused_across_shards(tmp_path):
    records = [write_shard(tmp_path / name, [("same", {"jpg": JPG})]) for name in ("a.tar", "b.tar")]
    with pytest.raises(DataError, match="'same' comes twice"):
        write_index(tmp_path, records)


def test_a_pair_of_two_sizes_is_refused(tmp_path):
    members = {"sharp.png": encode_png(picture(0)), "blurry.png": encode_png(picture(0, 64, 56))}
    with pytest.raises(DataError, match="differ in size"):
        write_shard(tmp_path / "a.tar", [("k", members)])


def test_failed_writer_leaves_no_index(tmp_path):
    def fail():
        with ShardWriter(tmp_path / "set") as writer:
            writer.add("a", {"jpg": JPG})
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    with pytest.raises(DataError, match="sharpprior index"):
        ShardSet(tmp_path / "set")


WRITER = """
import sys
from pathlib import Path
from data.shards.write import write_shard
jpg = Path(sys.argv[2]).read_bytes()
def endless():
    for number in range(10**9):
        yield f"k{number}", {"jpg": jpg}
        if number == 50:
            print("going", flush=True)
write_shard(Path(sys.argv[1]) / "a.tar", endless())
"""


def test_killed_writer_leaves_no_shard_under_its_final_name(tmp_path):
    (tmp_path / "p.jpg").write_bytes(JPG)
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(tmp_path / "p.jpg")]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"going\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not (tmp_path / "a.tar").exists()


def test_missing_path_shard_and_index_are_named(make_set, tmp_path):
    with pytest.raises(DataError, match="nowhere: no such data"):
        ShardSet(tmp_path / "nowhere")
    root = make_set()
    (root / "s_00001.tar").rename(tmp_path / "away.tar")
    with pytest.raises(DataError, match=r"s_00001\.tar: the shard is missing"):
        ShardSet(root)
    (root / "index.json").unlink()
    with pytest.raises(DataError, match=r"no index\.json here; make it with `sharpprior index"):
        ShardSet(root)


def test_torn_shard_is_named(make_set):
    path = make_set() / "s_00000.tar"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=r"s_00000\.tar: torn shard"):
        ShardSet(path.parent)


def test_tar_given_for_its_folder_is_refused_with_the_way_out(make_set):
    with pytest.raises(DataError, match="give the folder"):
        ShardSet(make_set() / "s_00000.tar")


def edit_index(root, change) -> None:
    """Change the index's first shard, and let its digest follow: somebody did it on purpose."""
    index = json.loads((root / "index.json").read_text())
    change(index["shards"][0])
    index["digest"] = digest_of_index(index)
    (root / "index.json").write_text(json.dumps(index))


IMPOSSIBLE = {
    "leaves the folder": lambda shard: shard.update(name="../set/s_00000.tar"),
    "differ in length": lambda shard: shard["heights"].pop(),
    "lie outside": lambda shard: shard["members"]["jpg"][0].__setitem__(0, -5),
    "lie outside s_00000": lambda shard: shard["members"]["jpg"][0].__setitem__(1, 10**13),
    "sizes in s_00000.tar are impossible": lambda shard: shard["widths"].__setitem__(0, 2**31 - 1),
    "does not read": lambda shard: shard["heights"].__setitem__(0, 2**70),
    "sha256 of": lambda shard: shard.update(sha256="../../etc"),
    "not all text": lambda shard: shard["keys"].__setitem__(0, 7),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_an_index_that_says_the_impossible_is_refused(make_set, message):
    root = make_set()
    edit_index(root, IMPOSSIBLE[message])
    with pytest.raises(DataError, match=message):
        ShardSet(root)


def test_no_flipped_bit_of_an_index_goes_unnoticed(make_set):
    root = make_set()
    path, whole, meant = root / "index.json", (root / "index.json").read_bytes(), ShardSet(root)
    rng = np.random.Generator(np.random.Philox(3))
    for bit in rng.choice(8 * len(whole), 400, replace=False):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        try:
            found = ShardSet(root)
        except DataError:
            continue
        for one, other in zip(found.shards, meant.shards, strict=True):  # white space
            assert (one.name, one.keys, one.sha256, one.bytes) == (other.name, other.keys, other.sha256, other.bytes)
            assert all(np.array_equal(one.members[ext], other.members[ext]) for ext in other.members)


def test_an_index_of_the_first_version_is_read(make_set):
    root = make_set()
    index = json.loads((root / "index.json").read_text())
    index["version"] = 1
    del index["digest"]
    (root / "index.json").write_text(json.dumps(index))
    assert len(ShardSet(root)) == 5


def test_a_shard_beside_the_index_is_named(make_set, caplog):
    root = make_set([3, 2])
    (root / "more.tar").write_bytes((root / "s_00000.tar").read_bytes())
    assert len(ShardSet(root)) == 5
    assert "more.tar: not in the index, so not used; `sharpprior index --add`" in caplog.text


def test_plain_image_is_taken_before_a_mask_beside_it(tmp_path):
    with ShardWriter(tmp_path / "set") as writer:
        writer.add("a", {"mask.png": encode_png(picture(1)), "JPG": JPG})
    shards = ShardSet(tmp_path / "set")
    assert (shards.kind, shards.image_member(0)) == ("sharp", "JPG")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format":"sharpprior-shards","version":99}', "\x00"])
def test_damaged_index_is_an_error_not_a_traceback(make_set, text):
    root = make_set()
    (root / "index.json").write_text(text)
    with pytest.raises(DataError):
        ShardSet(root)


def flip_byte(path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_flipped_byte_never_reaches_the_reader(make_set):
    root = make_set()
    shards = ShardSet(root)
    offset, size, _ = shards.shards[0].members["jpg"][1]
    flip_byte(root / "s_00000.tar", int(offset + size // 2))
    assert shards.read(0, "jpg")
    with pytest.raises(DataError, match=r"s_00000\.tar: sample s001\.jpg: damaged"):
        shards.read(1, "jpg")


def test_verify_names_every_kind_of_damage(make_set):
    root = make_set([2, 2, 2, 2])
    assert verify(root) == []
    index = ShardSet(root).shards
    flip_byte(root / "s_00000.tar", int(index[0].members["jpg"][1][0]) + 300)
    os.truncate(root / "s_00001.tar", 1000)
    (root / "s_00002.tar").unlink()
    flip_byte(root / "s_00003.tar", 5)  # in the first tar header
    (root / "s_00009.tar.tmp").write_bytes(b"left by a killed writer")
    problems = verify(root)
    expected = ["sample s001.jpg: damaged", "torn shard", "missing", "damaged between its samples", "not in the index"]
    assert len(problems) == len(expected)
    for problem, word in zip(problems, expected, strict=True):
        assert word in problem
        assert "\n" not in problem
    assert len(verify(root, decode=False)) == len(expected)


def test_verify_decodes_what_was_written_broken(tmp_path):
    half = encode_jpeg(picture(0, 128, 128))
    with ShardWriter(tmp_path / "set") as writer:
        writer.add("good", {"jpg": JPG})
        writer.add("broken", {"jpg": half[: len(half) // 2]})
    assert verify(tmp_path / "set", decode=False) == []
    (problem,) = verify(tmp_path / "set")
    assert "sample broken.jpg" in problem


def test_image_id_follows_the_content(make_set):
    one, two = ShardSet(make_set(name="one")), ShardSet(make_set(name="two"))
    assert one.image_id(0) == two.image_id(0) != one.image_id(1)
    assert one.image_id(0).startswith("s000-")


def test_reading_after_pickling_opens_files_anew(make_set):
    import pickle

    shards = ShardSet(make_set())
    data = shards.read(0, "jpg")
    assert pickle.loads(pickle.dumps(shards)).read(0, "jpg") == data
    shards.close()
    assert shards.read(0, "jpg") == data
    assert np.all(shards.shards[0].widths == 64)
