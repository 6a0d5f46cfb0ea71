"""Pairs through a network and into scores: in batches as one by one, with yardsticks, made once."""

from types import SimpleNamespace

import pytest
import torch

from train.config.file import configure
from train.config.patches import evaluated_at_once
from train.evaluate.held import HeldPairs
from train.evaluate.report import tier_lines, tier_table, verdict, yardstick_table
from train.evaluate.scores import Evaluation, Score, evaluate_pairs
from train.evaluate.yardsticks import ALL, Yardsticks

YARDSTICKS = Yardsticks({ALL: 1.0}, {ALL: (1.4, 0.5)})
CPU = torch.device("cpu")


class Network(torch.nn.Module):
    """Doubles as a student and teacher: it brightens, and its features are pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []

    def forward(self, image: torch.Tensor) -> SimpleNamespace:
        assert not self.training
        self.calls.append(tuple(image.shape))
        return SimpleNamespace(restored=[image * 1.1], prior=[image], student=[2 * image])


def pairs(count: int = 7) -> list[dict]:
    random = torch.Generator().manual_seed(5)
    made = []
    for number in range(count):
        sharp = torch.randint(0, 256, (3, 24, 24), generator=random, dtype=torch.uint8)
        blurry = ((sharp.float() + sharp.roll(1, -1).float()) / 2).to(torch.uint8)
        tier = ("severe", "extreme", "mild")[number % 3]
        made.append({"blurry": blurry, "sharp": sharp, "key": f"p{number // 3}", "tier": tier, "extent": 9.0,
                     "number": number, "kernel": None, "generator": "linear"})  # fmt: skip
    return made


def similarity(features, target) -> torch.Tensor:
    return torch.stack([(f * t).mean() for f, t in zip(features, target, strict=True)])


def evaluated(rows, network=None, **options) -> Evaluation:
    teacher = {"teacher": lambda image: [image.square()], "similarity": similarity}
    network = network or Network()
    network.train()
    result = evaluate_pairs(network, rows, device=CPU, yardsticks=YARDSTICKS, **teacher, **options)
    assert network.training
    return result


@pytest.mark.parametrize("at_once", [2, 3, 7, 16])
def test_batches_give_the_numbers_of_one_by_one(at_once):
    network = Network()
    alone, batched = evaluated(pairs(), keep={0, 4}), evaluated(pairs(), network, keep={0, 4}, at_once=at_once)
    assert batched.scores == alone.scores
    assert set(network.calls) == {(at_once, 3, 24, 24)}  # the last pass is filled up: one shape
    for name in ("similarity", "student_similarity", "blurry_similarity"):
        assert getattr(batched, name) == pytest.approx(getattr(alone, name), rel=1e-5)
    for one, other in zip(alone.pictures, batched.pictures, strict=True):
        assert one[0] == other[0]
        assert all((a == b).all() for a, b in zip(one[1:], other[1:], strict=True))


@pytest.mark.parametrize(("rows", "at_once", "expected"), [(5, 2, 4), (8, 2, 4), (0, 2, 4), (8, 1, 8)])
def test_ranks_with_fewer_pairs_run_the_network_as_often(rows, at_once, expected):
    """Under ZeRO-3 every forward pass gathers weights on all ranks."""
    network, told = Network(), []
    found = evaluated(
        pairs(rows), network, at_once=at_once, forwards=4, dummy_size=24, on_forward=lambda: told.append(1)
    )
    assert (len(network.calls), len(told), len(found.scores)) == (expected, expected, rows)
    assert {shape[0] for shape in network.calls} == {at_once}


def test_what_needs_no_network_is_measured_once(monkeypatch):
    rows = HeldPairs(lambda: iter(pairs()), size=1)
    first = evaluated(rows)
    assert all(set(score.yardsticks) == {"gaussian", "unsharp"} for score in first.scores)
    monkeypatch.setattr(Yardsticks, "apply", lambda *a, **k: pytest.fail("again"))
    assert evaluated(rows).scores == first.scores


def test_held_pairs_are_made_once_also_after_a_stop_and_large_lists_every_time():
    made = []

    def make():
        for number in range(4):
            made.append(number)
            yield {"number": number}

    held = HeldPairs(make, size=10, limit=10)
    for pair in held:
        if pair["number"] == 1:
            break
    assert made == [0, 1]
    assert [pair["number"] for pair in held] == [pair["number"] for pair in held] == [0, 1, 2, 3]
    assert made == [0, 1, 2, 3]
    large = HeldPairs(make, size=11, limit=10)
    assert [len(list(large)), len(list(large)), len(made)] == [4, 4, 12]


def test_a_batch_of_evaluation_needs_less_memory_than_training():
    settings = {"data.crop": 128, "eval.crop": 256, "train.batch": 16}
    config = configure([f"{name}={value}" for name, value in settings.items()])
    assert evaluated_at_once(config, 1, "cpu") == 1
    assert [evaluated_at_once(config, world, "cuda") for world in (1, 2, 4, 16)] == [8, 8, 4, 1]
    later = configure([*(f"{n}={v}" for n, v in settings.items()), "train.progressive=[{at: 10, crop: 128, batch: 2}]"])
    assert evaluated_at_once(later, 1, "cuda") == 2


# -- words -------------------------------------------------------------------------------------------------------------


def evaluation(restored: float, spread: float = 0.0, tier: str = "severe", trivial: float = 20.1) -> Evaluation:
    rows = []
    for n in range(6):
        smooth, sharpened = {"psnr": trivial, "ssim": 0.6}, {"psnr": 19.0, "ssim": 0.5}
        better = {"psnr": restored + spread * (-1) ** n, "ssim": 0.7}
        rows.append(Score(f"p{n}", tier, 40.0, {"psnr": 20.0, "ssim": 0.55}, better,
                          {"gaussian": smooth, "unsharp": sharpened}))  # fmt: skip
    return Evaluation(rows)


def test_a_weak_model_looks_weak():
    """It gains over the blurry input, and less than smoothing does."""
    weak = verdict(evaluation(20.05))
    assert "On the severe tier the restored picture is WORSE than the best that needs no model" in weak
    assert "-0.050 dB over Gaussian smoothing, +0.050 over the blurry input" in weak
    assert "cannot be told from the best that needs no model" in verdict(evaluation(20.1, spread=0.5))
    good = verdict(evaluation(21.0, spread=0.1))
    assert "is better than the best that needs no model, with an interval above 0 (+0.900 dB over Gaussian" in good
    alone = verdict(evaluation(21.0, trivial=19.0))
    assert alone.endswith("(+1.000 dB over the blurry input).")


def test_harm_to_sharp_pictures_is_said():
    assert verdict(evaluation(19.8, tier="identity")) == (
        "Pictures that are not blurred LOSE by it: -0.200 dB on the identity tier."
    )
    assert verdict(evaluation(19.95, tier="identity")) == ""


def test_tables_and_lines_have_the_gain_over_the_best_trivial_first():
    found = evaluation(20.5, spread=0.1)
    (line,) = tier_lines(found)
    assert "20.00 →  20.50 dB  over the best trivial (gaussian) +0.400 (" in line
    assert "gain over the input +0.500 (" in line
    head, _, row = tier_table(found).splitlines()
    assert head.count("|") == row.count("|")
    assert head.index("gain over the best trivial") < head.index("gain over the input")
    assert "| 20.00 | 20.50 | +0.400 (" in row
    assert "| Gaussian smoothing | +0.500 (" in row
    assert yardstick_table(found).splitlines()[2] == (
        "| severe | 20.00 / 0.5500 | 20.10 / 0.6000 | 19.00 / 0.5000 | 20.50 / 0.7000 |"
    )
