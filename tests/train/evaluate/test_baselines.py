"""What is known of inputs and smoothing is measured once, whoever asks, and never taken for another picture's."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.train.evaluate.test_measure import CPU, Brighter, pair
from train.evaluate import baselines, measure
from train.evaluate.baselines import Baselines
from train.evaluate.measure import Measuring
from train.evaluate.metrics import measured
from train.evaluate.yardsticks import Yardsticks

NAMES = ("psnr", "ssim")


def record(file, by: float, *, names=NAMES, device=CPU):
    how = {"names": names, "yardsticks": Yardsticks({"all": 2.0}, {"all": (1.0, 0.5)})}
    measuring = Measuring(Brighter(by), CPU, baselines=Baselines(file, device) if file else None, **how)
    return measuring.picture(pair(), "", crop=True)[0] | {"seconds": 0}


def test_a_second_model_s_record_is_the_same_and_only_its_own_picture_is_measured(tmp_path, monkeypatch):
    file, calls = tmp_path / "new" / "known.jsonl", []
    first = record(file, 0.1)

    def counted(restored, sharp, names):
        calls.append(restored)
        return measured(restored, sharp, names)

    monkeypatch.setattr(measure, "measured", counted)
    second = record(file, 0.2)
    assert len(calls) == 1
    assert second == record(None, 0.2)
    assert (second["input"], second["yardsticks"]) == (first["input"], first["yardsticks"])


def test_other_metrics_devices_and_code_are_measured_and_kept_beside(tmp_path, monkeypatch):
    file = tmp_path / "known.jsonl"
    record(file, 0.1, names=("psnr",))
    lines = len(file.read_text().split())
    assert record(file, 0.1) == record(None, 0.1)
    grown = len(file.read_text().split())
    assert grown > lines
    record(file, 0.1)
    assert len(file.read_text().split()) == grown
    record(file, 0.1, device=torch.device("cuda"))
    assert len(file.read_text().split()) == 2 * grown - lines
    monkeypatch.setattr("train.evaluate.baselines.computed_by", lambda: "other code")
    again = len(file.read_text().split())
    record(file, 0.1)
    assert len(file.read_text().split()) > again


def test_a_picture_s_values_are_of_these_two_pictures_alone(tmp_path):
    known, names = Baselines(tmp_path / "known.jsonl", CPU), ("psnr",)
    black, white = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 255, dtype=torch.uint8)
    wide = torch.zeros(3, 4, 16, dtype=torch.uint8)
    given = [(black, white), (white, black), (wide, wide), (black, black)]
    for number, (image, sharp) in enumerate(given):
        assert known.measured(image, sharp, names, lambda number=number: {"psnr": float(number)}) == {"psnr": number}


def test_torn_and_foreign_lines_are_passed_over_and_nothing_after_them_is_lost(tmp_path):
    file, image = tmp_path / "known.jsonl", torch.zeros(3, 8, 8, dtype=torch.uint8)
    Baselines(file, CPU).measured(image, image, ("psnr",), lambda: {"psnr": math.inf})
    whole = file.read_bytes()
    pair_of = json.loads(whole)["pair"]
    junk = [b"[1]", b"7", b"\xff\xfe", b'{"pair": "x"}', b'{"pair": "x", "metrics": 3}',
            json.dumps({"pair": pair_of, "metrics": {"psnr": "a"}}).encode()]  # fmt: skip
    file.write_bytes(b"\n".join(junk) + b"\n" + whole[: len(whole) // 2])  # the last is torn, without its end
    found = Baselines(file, CPU)
    assert found.measured(image, image, ("psnr",), lambda: {"psnr": 1.0}) == {"psnr": 1.0}
    again = Baselines(file, CPU)
    assert again.measured(image, image, ("psnr",), lambda: {"psnr": 2.0}) == {"psnr": 1.0}


def test_any_change_of_what_computes_a_metric_is_other_code(monkeypatch):
    before = baselines.computed_by.__wrapped__()
    assert before == baselines.computed_by.__wrapped__()
    monkeypatch.setattr(baselines, "version", lambda package: "0")
    assert baselines.computed_by.__wrapped__() != before
    monkeypatch.undo()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "fidelity.py"))
    assert baselines.computed_by.__wrapped__() != before


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(IsADirectoryError):
        Baselines(tmp_path, CPU)
