"""Which pairs are tested: fair draws, full pictures, the list that training evaluates on."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.errors import DataError
from data.shards.set import ShardSet
from data.stream.validation import validation_pairs
from tests.train.evaluate.trees import pairs_tree, tree
from tests.train.small_sets import small_set
from train.config.file import configure
from train.evaluate.asked import default_folder, open_pairs
from train.evaluate.pairs import RecordedPairs, ValidationPairs, fair_draw

SIZES = {"a": 40, "b": 20, "c": 10, "d": 1}
KEYS = [f"{scene}{n}" for scene, size in SIZES.items() for n in range(size)]
OF = [key[0] for key in KEYS]


@pytest.mark.parametrize("count", [1, 4, 7, 35, 71, 500])
def test_every_scene_gets_its_share_of_a_draw(count):
    drawn = fair_draw(KEYS, OF, count)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == min(count, len(KEYS))
    found = Counter(OF[n] for n in drawn)
    for scene, size in SIZES.items():
        assert abs(found[scene] - min(count, 71) * size / 71) < 1.5, scene  # systematic: no scene is crowded out


def test_a_draw_depends_on_names_alone_and_a_larger_one_adds_to_it():
    small, large = ({KEYS[n] for n in fair_draw(KEYS, OF, count)} for count in (10, 30))
    assert small < large
    order = np.random.Generator(np.random.Philox(1)).permutation(len(KEYS))
    keys, scenes = [KEYS[n] for n in order], [OF[n] for n in order]
    assert {keys[n] for n in fair_draw(keys, scenes, 10)} == small
    assert small != set(KEYS[:10])


def test_full_pictures_are_read_with_their_partner(tmp_path):
    root = pairs_tree(tmp_path / "p", 3)
    pairs = RecordedPairs("pairs", root)
    assert [item.tier for item in pairs.items] == ["", "", ""]
    assert not pairs.whole
    pair = pairs.read(pairs.items[1])
    assert pair.blurry.shape == pair.sharp.shape == (3, 50, 66)
    np.testing.assert_array_equal(pair.sharp.numpy().transpose(1, 2, 0), np.asarray(Image.open(root / "sharp/1.png")))
    np.testing.assert_array_equal(pair.blurry.numpy().transpose(1, 2, 0), np.asarray(Image.open(root / "blur/1.png")))


def test_pictures_that_do_not_match_or_read_are_named(tmp_path):
    root = pairs_tree(tmp_path / "p", 2)
    pairs = RecordedPairs("pairs", root)
    Image.new("RGB", (5, 5)).save(root / "blur/0.png")
    (root / "sharp/1.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"blur/0\.png: 5×5 px, its sharp partner 66×50"):
        pairs.read(pairs.items[0])
    with pytest.raises(DataError, match=r"sharp/1\.png"):
        pairs.read(pairs.items[1])


def test_pictures_whose_scene_nobody_knows_are_counted(tmp_path):
    root = pairs_tree(tmp_path / "p", 4)
    assert RecordedPairs("pairs", root).facts["scenes unknown"] == 4
    for kind in ("blur", "sharp"):
        for n in range(3):
            (root / kind / f"{n}.png").rename(root / kind / f"{n}fromGOPR10{n // 2}.png")
    facts = RecordedPairs("pairs", root).facts
    assert (facts["scenes"], facts["scenes unknown"]) == (3, 1)
    assert RecordedPairs("gopro", tree("gopro", tmp_path / "g", "test"), partial=True).facts["scenes unknown"] == 0


def test_crops_are_those_that_training_evaluates_on(tmp_path):
    shards, blur = ShardSet(small_set(tmp_path / "s", "val", 2)), configure([]).blur
    how = {"crop": 64, "margin": 16, "crops": 2, "seed": 0}
    pairs = ValidationPairs(shards, blur, label="v", crop=64, per_tier=2, margin=16)
    expected = list(validation_pairs(shards, blur, **how))
    assert len(pairs.items) == len(expected) == 20
    assert len({item.key for item in pairs.items}) == 20
    for item, pair in list(zip(pairs.items, expected, strict=True))[::3]:
        assert item.tier == pair["tier"]
        found = pairs.read(item)
        torch.testing.assert_close(found.blurry, pair["blurry"], rtol=0, atol=0)
        torch.testing.assert_close(found.sharp, pair["sharp"], rtol=0, atol=0)
        assert found.extent == pair["extent"]


def test_a_part_of_the_crops_keeps_every_tier_alike(tmp_path):
    shards, blur = ShardSet(small_set(tmp_path / "s", "val", 4)), configure([]).blur
    pairs = ValidationPairs(shards, blur, label="v", crop=64, per_tier=2, margin=16, max_pairs=17)
    assert set(Counter(item.tier for item in pairs.items).values()) == {3}
    with pytest.raises(DataError, match="at least 5"):
        ValidationPairs(shards, blur, label="v", crop=64, per_tier=2, margin=16, max_pairs=4)


def test_what_is_written_after_data_is_understood(tmp_path):
    config = configure(["eval.crop=64", "eval.per_tier=1"])
    root = tree("gopro", tmp_path / "g", "test")
    gopro = open_pairs(f"gopro:{root}", config, partial=True)
    assert (gopro.label, gopro.facts["split"], gopro.facts["blur variant"]) == ("gopro-test-blur", "test", "blur")
    assert (gopro.facts["pairs"], gopro.facts["of"], gopro.facts["released"]) == (2, 2, 1111)
    assert not gopro.aligned
    assert open_pairs(f"realblur-j:{tree('realblur-j', tmp_path / 'r', 'test')}", config, partial=True).aligned
    shards = small_set(tmp_path / "shards", "val", 2)
    for text in (str(shards), f"synth:{shards}"):
        assert open_pairs(text, config).label == "synth-shards"
    assert open_pairs(None, config).label == open_pairs("synth", config).label == "validation"
    named = {"folders": ("mine", "sharp")}
    (pairs_tree(tmp_path / "p", 2) / "blur").rename(tmp_path / "p" / "mine")
    (tmp_path / "p" / "test").mkdir()
    for kind in ("mine", "sharp"):
        (tmp_path / "p" / kind).rename(tmp_path / "p" / "test" / kind)
    assert open_pairs(f"pairs:{tmp_path / 'p'}", config, **named).label == "pairs-p-test"
    for kind in ("mine", "sharp"):
        (tmp_path / "p" / "test" / kind).rename(tmp_path / "p" / kind)
    (tmp_path / "p" / "test").rmdir()
    mine = open_pairs(f"pairs:{tmp_path / 'p'}", config, **named)
    assert (mine.label, mine.facts["split"]) == ("pairs-p", "no split")
    assert [item.scene for item in mine.items] == [item.key for item in mine.items]


@pytest.mark.parametrize(
    ("text", "how", "words"),
    [
        ("gorpo:/x", {}, "did you mean gopro"),
        ("gopro", {}, "gopro:PATH"),
        ("gopro:", {}, "gopro:PATH"),
        ("folder:/x", {}, "photographs alone are no pairs"),
        ("synth:", {}, "name a shard set"),
        ("nowhere", {}, "nowhere: no such data"),
        ("gopro:{tmp}", {}, r"test: missing|test.*missing"),
        ("gopro:{tmp}", {"crop": 64}, "--crop: full pictures"),
        (None, {"split": "test"}, "--split: a shard set has crops alone"),
        ("gopro:{tmp}", {"folders": ("a", "b")}, "are of pairs:PATH"),
        ("gopro:{tmp}/repack", {}, r"`--data pairs:.*repack`"),
        ("pairs:{tmp}/repack", {"variant": "x"}, "--variant x: pairs have no variants"),
        ("pairs:{tmp}/repack", {"variant": "x", "folders": ("input", "target")}, "--variant x: pairs have no variants"),
        ("pairs:{tmp}/repack", {"split": "test"}, "--split test: no folder .*repack/test"),
        ("pairs:{tmp}/repack", {"split": "eval", "folders": ("input", "target")}, "--split eval: no folder"),
        (
            "pairs:{tmp}/repack",
            {"split": "test", "pairs_list": Path("l")},
            "--split test: the pairs are those of --list",
        ),
        ("pairs:{tmp}/repack", {"folders": ("a", "b"), "pairs_list": Path("l")}, "give one of them"),
    ],
)
def test_mistakes_after_data_are_told_with_the_way_out(tmp_path, text, how, words):
    for kind in ("input", "target"):
        (tmp_path / "repack" / kind).mkdir(parents=True)
    with pytest.raises(ValueError, match=words):
        open_pairs(text and text.format(tmp=tmp_path), configure([]), **how)


def test_numbers_go_beside_what_they_are_of(tmp_path):
    pairs = open_pairs(None, configure([]))
    checkpoint = tmp_path / "runs/a/checkpoints/step-12"
    assert default_folder(checkpoint, pairs, "step 12") == tmp_path / "runs/a/evaluations/validation-step-12"
    file = tmp_path / "m.safetensors"
    file.write_bytes(b"")
    assert default_folder(file, pairs, "m.safetensors") == tmp_path / "m-evaluations/validation"
