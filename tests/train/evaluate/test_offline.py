"""One process's part of an evaluation: what must not end it, what is done again, what is kept."""

import os

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.evaluate.trees import pairs_tree, tiny_model
from train.evaluate import offline, telling
from train.evaluate.offline import Evaluating, Settings, finish
from train.evaluate.pairs import RecordedPairs
from train.evaluate.yardsticks import Yardsticks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("train.evaluate.offline.yardsticks_of", lambda *_, **__: (Yardsticks(), "nothing"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return offline.Tested.load(tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors"), "latest", CPU)


def evaluating(model, root, out, *, layout="pairs", **how) -> Evaluating:
    return Evaluating(model, RecordedPairs(layout, root), out, CPU, Settings(**how), overwrite=False)


def tiny_pair(root, size: int) -> None:
    for kind in ("blur", "sharp"):
        Image.fromarray(np.full((size, size + 1, 3), 90, np.uint8)).save(root / kind / "tiny.png")


@pytest.mark.parametrize("size", [1, 8])
def test_a_picture_that_no_metric_takes_fails_alone(model, tmp_path, size):
    root = pairs_tree(tmp_path / "p", 2)
    tiny_pair(root, size)
    told = {}
    evaluation = evaluating(model, root, tmp_path / "o")
    assert evaluation.run(lambda item, why: told.update({item.key: why})) == 3
    (failed,) = finish(evaluation)["failed"]
    assert failed["why"] == told[failed["key"]]
    assert failed["why"].startswith("blur_tiny: ")
    assert "ssim" in failed["why"]
    assert sum(why is None for why in told.values()) == 2


def test_one_that_cannot_be_aligned_fails_alone(model, tmp_path, monkeypatch):
    root = pairs_tree(tmp_path / "p", 2)
    tiny_pair(root, 8)
    evaluation = evaluating(model, root, tmp_path / "o")
    evaluation.pairs.aligned = True
    monkeypatch.setattr("train.evaluate.measure.measured", lambda *_: [{"psnr": 20.0, "ssim": 0.5}])
    assert evaluation.run() == 3
    records = evaluation.book.records()
    assert [key for key, record in records.items() if "failed" in record] == ["blur_tiny"]
    assert all("psnr_aligned" in record["input"] for record in records.values() if "failed" not in record)


def test_an_altered_picture_of_equal_size_is_measured_again_and_a_copy_is_not(model, tmp_path):
    root, out = pairs_tree(tmp_path / "p", 3), tmp_path / "o"
    for n in range(3):
        for kind in ("blur", "sharp"):
            Image.open(root / kind / f"{n}.png").save(root / kind / f"{n}.bmp")
            (root / kind / f"{n}.png").unlink()
    first = evaluating(model, root, out)
    first.run()
    before = first.book.records()
    altered, copied = root / "blur/1.bmp", root / "sharp/2.bmp"
    whole = altered.read_bytes()
    altered.write_bytes(whole[:-300] + bytes(300))
    os.utime(copied, ns=(0, 0))
    again = evaluating(model, root, out)
    assert [item.key for item in again.todo()] == ["blur_1"]
    assert again.run() == 1
    after = again.book.records()
    assert after["blur_1"]["input"]["psnr"] != before["blur_1"]["input"]["psnr"]
    assert after["blur_2"] == before["blur_2"]
    assert evaluating(model, root, out).todo() == []
    assert all(not {"stamp", "content"} & picture.keys() for picture in finish(again)["pictures"])


def test_restored_pictures_are_kept_of_a_finished_evaluation_too(model, tmp_path):
    root, out = pairs_tree(tmp_path / "p", 3), tmp_path / "o"
    first = evaluating(model, root, out)
    first.run()
    before = finish(first)
    assert not (out / "restored").exists()
    again = evaluating(model, root, out, save=True)
    assert again.run() == 3
    assert finish(again)["tiers"] == before["tiers"]
    assert {path.name for path in (out / "restored").iterdir()} == {f"blur_{n}.png" for n in range(3)}
    (out / "restored/blur_1.png").unlink()
    assert [item.key for item in evaluating(model, root, out, save=True).todo()] == ["blur_1"]
    assert evaluating(model, root, out).todo() == []


def test_recorded_pairs_are_told_how_their_yardsticks_were_chosen(model, tmp_path):
    evaluation = evaluating(model, pairs_tree(tmp_path / "p", 2), tmp_path / "o")
    evaluation.run()
    results = finish(evaluation)
    assert "same bin of input PSNR" in telling.explanation(results)
    for picture in results["pictures"]:
        picture["tier"] = "severe"
    assert "bin of input PSNR" not in telling.explanation(results)


def test_where_no_alignment_is_found_the_report_does_not_lean_on_the_official_script(model, tmp_path):
    """Its formulas raise there: such numbers are ours alone."""
    flat, textured = np.full((40, 50), 0.5, np.float32), np.random.default_rng(0).random((40, 50), np.float32)
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 0)
    with pytest.raises(cv2.error):
        cv2.findTransformECC(flat, textured, np.eye(3, dtype=np.float32), cv2.MOTION_HOMOGRAPHY, criteria, None, 5)
    evaluation = evaluating(model, pairs_tree(tmp_path / "p", 2), tmp_path / "o")
    evaluation.run()
    results = finish(evaluation)
    results["pictures"][0]["not aligned"] = ["input", "restored"]
    (line,) = [line for line in telling.warnings(results) if "alignment" in line]
    assert "no transform 2 times (1 of restored pictures)" in line
    assert "not moved: the official script stops there" in line


def test_scenes_that_nobody_knows_are_told(model, tmp_path):
    root = pairs_tree(tmp_path / "p", 2)
    evaluation = evaluating(model, root, tmp_path / "o")
    evaluation.run()
    assert any("Scenes are not known of all of 2 pictures" in line for line in telling.warnings(finish(evaluation)))
