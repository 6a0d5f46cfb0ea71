"""Datasets as released: miniature trees of every layout, pairs matched by name, what is missing named."""

from pathlib import Path

import pytest

from data.errors import DataError
from data.prepare.layouts import LAYOUTS, key_of, list_dataset, pairs_in_folders, pairs_of_list
from data.shards.tar import KEY

REALBLUR = "RealBlur-{}_{}ECC_IMCORR_centroid_itensity_ref"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def gopro(root: Path) -> None:
    for split, sequence in (("train", "GOPR0372_07_00"), ("train", "GOPR0372_07_01"), ("test", "GOPR0384_11_00")):
        for folder in ("blur", "blur_gamma", "sharp"):
            touch(root, *(f"{split}/{sequence}/{folder}/{n:06d}.png" for n in (47, 48)))


def hide(root: Path) -> None:
    touch(
        root,
        "train/1fromGOPR0.png",
        "test/test-close-ups/a.png",
        "test/test-long-shot/b.png",
        "test/test-long-shot/c.png",
    )
    touch(root, *(f"GT/{name}.png" for name in ("1fromGOPR0", "a", "b", "c")))


def realblur(root: Path) -> None:
    for camera, middle in (("J", ""), ("R", "BM3D_")):
        folder = REALBLUR.format(camera, middle)
        for split, scene, count in (("train", "scene001", 3), ("test", "scene230", 2)):
            names = [
                (f"{folder}/{scene}/gt/gt_{n}.png", f"{folder}/{scene}/blur/blur_{n}.png") for n in range(1, count + 1)
            ]
            touch(root, *(name for pair in names for name in pair))
            lines = "".join(f"{sharp} {blurry} \n" for sharp, blurry in names)
            (root / f"RealBlur_{camera}_{split}_list.txt").write_text(lines)


def reds(root: Path) -> None:
    for split, clip, frames in (("train", "000", 3), ("val", "007", 20)):
        for kind, suffix in (("sharp", "png"), ("blur", "png"), ("blur_comp", "png"), ("blur_jpeg", "jpg")):
            touch(root, *(f"{split}/{split}_{kind}/{clip}/{n:08d}.{suffix}" for n in range(frames)))


def rsblur(root: Path) -> None:
    for split, number in (("train", "000722"), ("val", "000422"), ("test", "000022")):
        base = f"RSBlur/0019/{number}"
        touch(root, f"{base}/gt/gt_sharp.png", f"{base}/real_blur/real_blur.png", f"{base}/avg65_img/avg_blur.png")
        line = f"{base}/gt/gt_sharp.png {base}/real_blur/real_blur.png\n"
        touch(root, f"datalist/RSBlur/RSBlur_real_{split}.txt")
        (root / f"datalist/RSBlur/RSBlur_real_{split}.txt").write_text(line)


def repack(root: Path) -> None:
    touch(
        root,
        *(f"{split}/{kind}/{n}.png" for split in ("train", "test") for kind in ("input", "target") for n in (1, 2)),
    )


BUILD = {
    "gopro": gopro, "hide": hide, "realblur-j": realblur, "realblur-r": realblur, "reds": reds, "rsblur": rsblur,
    "pairs": repack,
}  # fmt: skip
COUNTS = [
    ("gopro", "train", None, 4), ("gopro", "test", "blur_gamma", 2),
    ("hide", "train", None, 1), ("hide", "test", None, 3), ("hide", "test", "long-shot", 2),
    ("realblur-j", "train", None, 3), ("realblur-j", "test", None, 2), ("realblur-r", "test", None, 2),
    ("reds", "train", None, 3), ("reds", "val", "blur_jpeg", 20), ("reds", "val300", None, 2),
    ("rsblur", "train", None, 1), ("rsblur", "val", "avg65_img", 1), ("rsblur", "test", None, 1),
    ("pairs", "train", None, 2), ("pairs", "test", None, 2),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "split", "variant", "count"), COUNTS)
def test_layout_is_listed_with_its_partners(tmp_path, layout, split, variant, count):
    BUILD[layout](tmp_path)
    pairs = list_dataset(layout, tmp_path, split=split, variant=variant, partial=True)
    assert len(pairs) == count
    assert len({pair.key for pair in pairs}) == count
    for pair in pairs:
        assert KEY.fullmatch(pair.key)
        assert pair.sharp.is_file()
        assert pair.blurry.is_file()
        assert pair.sharp != pair.blurry
    assert pairs == list_dataset(layout, tmp_path, split=split, variant=variant, partial=True)


def test_gopro_pairs_stay_inside_their_sequence_and_variant(tmp_path):
    gopro(tmp_path)
    for pair in list_dataset("gopro", tmp_path, split="train", variant="blur_gamma", partial=True):
        assert pair.blurry.parent.name == "blur_gamma"
        assert pair.sharp == pair.blurry.parent.parent / "sharp" / pair.blurry.name


def test_reds_val300_takes_frames_ending_in_nine(tmp_path):
    reds(tmp_path)
    pairs = list_dataset("reds", tmp_path, split="val300", partial=True)
    assert [pair.blurry.stem for pair in pairs] == ["00000009", "00000019"]


def test_parent_of_the_dataset_folder_works_too(tmp_path):
    gopro(tmp_path / "GOPRO_Large")
    assert len(list_dataset("gopro", tmp_path, partial=True)) == 4


@pytest.mark.parametrize("layout", [name for name in BUILD if LAYOUTS[name].counts])
def test_incomplete_copies_are_refused_with_both_counts(tmp_path, layout):
    BUILD[layout](tmp_path)
    with pytest.raises(DataError, match=r"where \d+ were released"):
        list_dataset(layout, tmp_path)


@pytest.mark.parametrize(
    ("layout", "gone"),
    [
        ("gopro", "train/GOPR0372_07_00/sharp/000047.png"),
        ("gopro", "train/GOPR0372_07_00/blur/000047.png"),
        ("hide", "GT/1fromGOPR0.png"),
        ("realblur-j", REALBLUR.format("J", "") + "/scene001/gt/gt_2.png"),
        ("realblur-r", REALBLUR.format("R", "BM3D_") + "/scene001/blur/blur_2.png"),
        ("reds", "train/train_sharp/000/00000001.png"),
        ("rsblur", "RSBlur/0019/000722/real_blur/real_blur.png"),
        ("pairs", "train/target/2.png"),
        ("pairs", "train/input/2.png"),
    ],
)
def test_missing_partner_is_named(tmp_path, layout, gone):
    BUILD[layout](tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(DataError, match=Path(gone).stem):
        list_dataset(layout, tmp_path, partial=True)


def test_swapped_columns_of_a_list_are_refused(tmp_path):
    realblur(tmp_path)
    path = tmp_path / "RealBlur_J_train_list.txt"
    path.write_text("".join(" ".join(reversed(line.split())) + "\n" for line in path.read_text().splitlines()))
    with pytest.raises(DataError, match=r"list\.txt:1: expected …/gt/… first"):
        list_dataset("realblur-j", tmp_path, partial=True)


@pytest.mark.parametrize("layout", list(BUILD))
def test_empty_folder_is_refused_with_what_was_expected(tmp_path, layout):
    with pytest.raises(DataError):
        list_dataset(layout, tmp_path)
    with pytest.raises(DataError, match="missing"):
        list_dataset(layout, tmp_path / "nowhere")


def test_unknown_layout_split_and_variant_are_refused_with_the_choice(tmp_path):
    with pytest.raises(DataError, match=r"one of .*gopro, hide"):
        list_dataset("gorpo", tmp_path)
    with pytest.raises(DataError, match="split 'val'; one of train, test"):
        list_dataset("gopro", tmp_path, split="val")
    with pytest.raises(DataError, match="one of blur, blur_gamma"):
        list_dataset("gopro", tmp_path, variant="sharp")


@pytest.mark.parametrize(("blurry", "sharp"), [("blur", "sharp"), ("lq", "gt"), ("blurry", "sharp")])
def test_folders_of_pairs_under_their_common_names(tmp_path, blurry, sharp):
    touch(tmp_path, f"{blurry}/a.jpg", f"{sharp}/a.png")
    (pair,) = list_dataset("pairs", tmp_path)
    assert (pair.blurry.name, pair.sharp.name) == ("a.jpg", "a.png")


def test_photographs_are_found_below_the_folder_and_others_left(tmp_path):
    touch(tmp_path, "b/IMG 1.JPG", "b/img_1.jpg", "a.png", "a.jpg", "notes.txt", "c/d/e.webp")
    pairs = list_dataset("folder", tmp_path)
    assert [pair.sharp.name for pair in pairs] == ["a.jpg", "a.png", "IMG 1.JPG", "img_1.jpg", "e.webp"]
    assert all(pair.blurry is None for pair in pairs)
    assert len({pair.key for pair in pairs}) == 5


@pytest.mark.parametrize("name", ["a", "été.png", "日本", "A" * 200, "x/y-z.png", "a b", ""])
def test_keys_are_valid_whatever_the_name(name):
    assert KEY.fullmatch(key_of(name))
    assert len(key_of(name)) <= 64


def test_names_that_differ_only_in_lost_letters_keep_different_keys():
    assert len({key_of(name) for name in ("IMG 1", "IMG_1", "img_1", "img-1 ", "Img_1")}) == 5


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_the_table_keeps_the_contract(name, tmp_path, sharpprior):
    """A function and a row are all that a new layout needs: this runs over the table."""
    layout = LAYOUTS[name]
    assert layout.help
    assert layout.licence
    assert layout.splits
    assert layout.variants
    assert layout.counts.keys() <= set(layout.splits)
    assert set(layout.parts) < set(layout.variants)
    for options, words in (
        ({"split": "nonsense"}, f"{name}: split 'nonsense'; one of"),
        ({"variant": "nonsense"}, f"{name}: variant 'nonsense'; one of"),
    ):
        with pytest.raises(DataError, match=words):
            list_dataset(name, tmp_path, **options)
    for split in layout.splits:  # an empty folder is told, whatever is looked for in it
        with pytest.raises(DataError, match=str(tmp_path)):
            list_dataset(name, tmp_path, split=split)
    status, out, _ = sharpprior("prepare", "--help")
    assert status == 0
    assert name in out.replace("│", " ").replace(",", " ").split()
    status, _, error = sharpprior("prepare", name, tmp_path / "nowhere", tmp_path / "out")
    assert status == 1
    assert "nowhere" in error


def test_nested_pairs_and_named_folders_are_all_found(tmp_path):
    touch(tmp_path, "blur/a/1.png", "blur/b/1.png", "blur/10.png", "sharp/a/1.jpg", "sharp/b/1.png", "sharp/10.png")
    pairs = list_dataset("pairs", tmp_path)
    names = [tuple(str(path.relative_to(tmp_path)) for path in (pair.blurry, pair.sharp)) for pair in pairs]
    assert names == [
        ("blur/a/1.png", "sharp/a/1.jpg"),
        ("blur/b/1.png", "sharp/b/1.png"),
        ("blur/10.png", "sharp/10.png"),
    ]
    (tmp_path / "sharp" / "b" / "1.png").unlink()
    with pytest.raises(DataError, match=r"blur/b/1\.png: its sharp partner"):
        list_dataset("pairs", tmp_path)


def test_two_kinds_of_folders_are_not_guessed(tmp_path):
    touch(tmp_path, "blur/1.png", "sharp/1.png", "input/1.png", "target/1.png", "mine/1.png")
    with pytest.raises(
        DataError, match=r"input/ with target/ and blur/ with sharp/; say which are meant with --blurry"
    ):
        list_dataset("pairs", tmp_path)
    (pair,) = pairs_in_folders(tmp_path, "mine", "target", root=tmp_path)
    assert (pair.blurry, pair.sharp) == (tmp_path / "mine/1.png", tmp_path / "target/1.png")
    with pytest.raises(DataError, match="nowhere: missing"):
        pairs_in_folders(tmp_path, "nowhere", "target", root=tmp_path)


def test_a_list_says_the_pairs_and_swapped_columns_are_seen(tmp_path):
    touch(tmp_path, "x/gt/a 1.png", "x/blur/a 1.png", "x/gt/2.png", "x/blur/2.png")
    (tmp_path / "list.txt").write_text("x/gt/a 1.png\tx/blur/a 1.png\n\nx/gt/2.png x/blur/2.png\n")
    assert [pair.blurry.name for pair in pairs_of_list(tmp_path / "list.txt", tmp_path)] == ["a 1.png", "2.png"]
    for text, words in (
        ("x/blur/2.png x/gt/2.png", "comes first and is blurry"),
        ("x/gt/2.png", "1 paths"),
        ("x/gt/2.png x/blur/3.png", r"3\.png: missing \(line 1"),
    ):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(DataError, match=words):
            pairs_of_list(tmp_path / "list.txt", tmp_path)
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="does not read"):
        pairs_of_list(tmp_path / "list.txt", tmp_path)


def test_wrong_layouts_point_to_the_right_one(tmp_path):
    touch(tmp_path / "repack", "train/input/1.png", "train/target/1.png")
    with pytest.raises(DataError, match=r"prepare pairs .*repack/train"):
        list_dataset("gopro", tmp_path / "repack")
    with pytest.raises(DataError, match=r"prepare pairs .*repack/train"):
        list_dataset("pairs", tmp_path / "repack", split="test")
    touch(tmp_path / "gopro", "train/GOPR1/blur/1.png", "train/GOPR1/sharp/1.png")
    with pytest.raises(DataError, match=r"prepare gopro .*gopro`"):
        list_dataset("pairs", tmp_path / "gopro")
    with pytest.raises(DataError, match="nosuch: missing, or no folder; give the folder of sharp photographs"):
        list_dataset("folder", tmp_path / "nosuch")


def test_keys_of_long_paths_keep_the_picture_s_number():
    name = "RealBlur-J_ECC_IMCORR_centroid_itensity_ref/scene001/blur/blur_12"
    assert "scene001_blur_blur_12_" in key_of(name)
    assert key_of(name) != key_of(name.replace("12", "13"))


def test_what_systems_leave_behind_is_no_photograph(tmp_path):
    touch(tmp_path, "a.png", "._a.png", "sub/._b.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "sub/b.png")
    assert [pair.sharp.name for pair in list_dataset("folder", tmp_path)] == ["a.png", "b.png"]


def test_linked_folders_are_followed_once(tmp_path):
    touch(tmp_path / "elsewhere", "x.png")
    touch(tmp_path / "photos", "a.png")
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "round").symlink_to(tmp_path / "photos")
    assert [pair.sharp.name for pair in list_dataset("folder", tmp_path / "photos")] == ["a.png", "x.png"]


def test_a_list_s_paths_lie_below_the_root_whatever_their_form(tmp_path):
    base = tmp_path / "base"
    touch(base, "gt/1.png", "in/1.png")
    touch(tmp_path, "out.png")
    for text in ("gt/1.png,in/1.png", f"{base}/gt/1.png in/1.png", "\ufeffgt/1.png in/1.png"):
        (tmp_path / "list.txt").write_text(text, encoding="utf-8")
        (pair,) = pairs_of_list(tmp_path / "list.txt", base)
        assert pair.sharp == base / "gt" / "1.png"
    (tmp_path / "list.txt").write_text("../out.png in/1.png")
    with pytest.raises(DataError, match=r"list\.txt:1: \.\./out\.png lies outside"):
        pairs_of_list(tmp_path / "list.txt", base)
