"""PSNR, SSIM and intervals against values worked out by hand or by other means."""

import math

import cv2
import numpy as np
import pytest
import torch

from data.image import psnr
from train.evaluate import perceptual
from train.evaluate.metrics import METRICS, as_picture, bootstrap_mean_interval, measured, metric_names, to_uint8
from train.evaluate.report import tier_lines, tier_table, write_report
from train.evaluate.scores import Evaluation, Score, merge


def picture(seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def test_psnr_of_a_constant_difference_is_the_formula():
    sharp = np.full((10, 12, 3), 100, np.uint8)
    assert psnr(sharp + 5, sharp) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(sharp, sharp) == math.inf
    with pytest.raises(ValueError, match="one, non-empty shape"):
        psnr(sharp, sharp[:5])
    with pytest.raises(ValueError, match="uint8"):
        psnr(sharp.astype(np.float32), sharp)


def test_psnr_does_not_wrap_around():
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert psnr(black, white) == pytest.approx(0.0)


def batch(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())


def test_psnr_of_tensors_is_that_of_pictures():
    sharp, other = picture(0), picture(1)
    found = measured(batch(other, sharp, np.uint8(255) - sharp), batch(sharp, sharp, sharp), ["psnr"])
    assert [row["psnr"] for row in found] == [
        pytest.approx(psnr(other, sharp), abs=1e-12),
        60.0,
        pytest.approx(psnr(255 - sharp, sharp), abs=1e-12),
    ]


def test_ssim_of_a_picture_with_itself_is_1_and_falls_with_noise():
    sharp = picture(0)
    noisy = np.clip(sharp.astype(int) + picture(1) // 8, 0, 255).astype(np.uint8)
    same, near, far = (row["ssim"] for row in measured(batch(sharp, noisy, picture(2)), batch(*[sharp] * 3), ["ssim"]))
    assert same == pytest.approx(1.0)
    assert far < near < 1
    assert near > 0


HERE = [name for name, metric in METRICS.items() if metric.here()]


@pytest.mark.parametrize("name", HERE)
def test_every_metric_of_the_table_keeps_the_contract(name, tmp_path):
    """A row is all that a new metric needs: this runs over the table."""
    metric, sharp = METRICS[name], picture(0)
    worse = cv2.GaussianBlur(sharp, (0, 0), 1.0)
    kept = worse.copy()
    names = list(dict.fromkeys(["psnr", name]))
    first, second = measured(batch(worse, sharp), batch(sharp, sharp), names)
    near, same = first[name], second[name]
    assert all(isinstance(value, float) and math.isfinite(value) for value in (same, near))
    assert near < same if metric.better == "higher" else near > same
    assert (worse == kept).all()  # the pictures are left alone
    (alone,) = measured(batch(worse), batch(sharp), names)
    assert alone[name] == pytest.approx(
        near, abs=1e-12 if name not in ("features", "classes", "lpips", "dists") else 1e-5
    )
    evaluation = Evaluation([Score("a", "severe", 40.0, first, second)])
    (row,) = evaluation.record()["tiers"]
    assert (row[f"input_{name}"], row[f"restored_{name}"]) == (near, same)
    write_report(tmp_path / "report.md", evaluation, title="T", facts={}, before=[])
    shown = f"{near:.{metric.digits}f}", f"{same:.{metric.digits}f}"
    assert f"{shown[0]} | {shown[1]} |" in tier_table(evaluation)
    assert all(value in tier_lines(evaluation)[0] for value in shown)
    assert f"{metric.label}: {metric.note}." in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("first", "second", "names", "told"),
    [
        (torch.zeros(1, 3, 20, 20), torch.zeros(1, 3, 20, 20), ["psnr"], "float32 .* give uint8 RGB"),
        (torch.zeros(1, 3, 20, 20).byte(), torch.zeros(1, 3, 20, 21).byte(), ["psnr"], "give pictures of one"),
        (torch.zeros(1, 3, 10, 20).byte(), torch.zeros(1, 3, 10, 20).byte(), ["ssim"], "its window is 11 px"),
        (torch.zeros(1, 3, 20, 20).byte(), torch.zeros(1, 3, 20, 20).byte(), ["simm"], "did you mean ssim"),
    ],
)
def test_what_cannot_be_measured_is_refused(first, second, names, told):
    with pytest.raises(ValueError, match=told):
        measured(first, second, names)


def test_features_of_the_last_sharp_picture_are_kept_for_that_picture_alone():
    first, second = picture(0), picture(1)
    worse = [cv2.GaussianBlur(each, (0, 0), 1.0) for each in (first, second)]
    alone = [
        perceptual.features(batch(blurry), batch(sharp)) for blurry, sharp in zip(worse, (first, second), strict=True)
    ]
    for blurry, sharp, expected in [(0, 0, 0), (1, 1, 1), (0, 0, 0)]:
        found = perceptual.features(batch(worse[blurry]), batch((first, second)[sharp]))
        assert torch.equal(found, alone[expected])
    changed = batch(second)
    perceptual.features(batch(worse[1]), changed)
    changed.copy_(batch(first))  # another picture in the same memory
    assert torch.equal(perceptual.features(batch(worse[0]), changed), alone[0])


def test_a_sharp_picture_goes_through_the_network_once_for_all_that_are_compared_with_it(monkeypatch):
    seen, network = [], perceptual._teacher("efficientnet_lite0", torch.device("cpu"))
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda image: seen.append(1) or forward(image))
    sharp = batch(picture(7))
    for seed in (8, 9, 10):
        perceptual.features(batch(picture(seed)), sharp)
    assert len(seen) == 4


def test_a_metric_that_is_asked_for_is_measured_or_refused(monkeypatch):
    assert "classes" not in metric_names("full")
    assert "classes" in metric_names("full", ["classes"])
    with pytest.raises(ValueError, match="did you mean classes"):
        metric_names("full", ["class"])
    monkeypatch.setitem(METRICS, "classes", METRICS["classes"]._replace(here=lambda: False))
    with pytest.raises(ValueError, match="metric classes is not here"):
        metric_names("full", ["classes"])


def test_training_measures_less_than_evaluate():
    assert metric_names() == ("psnr", "ssim")
    assert metric_names("full")[:7] == ("psnr", "ssim", "ssim_3d", "gms", "gmsd", "features", "blur")


def test_to_uint8_clamps_and_rounds():
    values = torch.tensor([-1.0, 0.0, 0.499 / 255, 0.501 / 255, 254.6 / 255, 2.0])
    assert to_uint8(values.view(1, 1, 6).expand(3, 1, 6))[:, 0].tolist() == [[0, 0, 0, 1, 255, 255]] * 3
    assert to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 3, 4, 5)
    assert as_picture(torch.zeros(3, 4, 5).byte()).shape == (4, 5, 3)


def test_the_interval_resamples_clusters_and_not_values():
    rng = np.random.Generator(np.random.Philox(1))
    level = rng.normal(0.3, 1.0, 20)
    values = np.repeat(level, 10) + rng.normal(0, 1e-6, 200)
    clusters = np.repeat([f"photograph{i}" for i in range(20)], 10)
    low, high = bootstrap_mean_interval(values, clusters)
    error = level.std(ddof=1) / math.sqrt(20)
    assert low < values.mean() < high
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.1)
    alone = bootstrap_mean_interval(values, [str(i) for i in range(200)])
    assert high - low > 2.5 * (alone[1] - alone[0])


def test_the_interval_is_the_same_every_time_and_refuses_nonsense():
    assert bootstrap_mean_interval([1, 2, 3], "abc") == bootstrap_mean_interval([1, 2, 3], "abc")
    assert all(math.isnan(bound) for bound in bootstrap_mean_interval([1, 2], "aa"))
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean_interval([], "")


def score(key: str, tier: str, gain: float) -> Score:
    blurry = dict.fromkeys(metric_names(), 0.5) | {"psnr": 20.0}
    return Score(key, tier, 40.0, blurry, blurry | {"psnr": 20.0 + gain})


def test_parts_of_the_ranks_merge_into_one_evaluation():
    one = Evaluation([score("a", "severe", 1.0), score("b", "extreme", 0.0)], [0.2], [0.3], [0.1])
    two = Evaluation([score("c", "severe", 3.0)], [0.8], [0.9], [0.4])
    whole = merge([one, two, Evaluation()])
    assert [row.tier for row in whole.tiers()] == ["severe", "extreme"]
    assert whole.tiers()[0].gain == pytest.approx(2.0)
    assert whole.severe_gain() == pytest.approx(4 / 3)
    assert whole.similarity == [pytest.approx(0.4)]
    assert whole.student_similarity == [pytest.approx(0.5)]
    assert whole.blurry_similarity == [pytest.approx(0.2)]
    assert [s.key for s in whole.scores] == [s.key for s in merge([two, one]).scores]


def test_recorded_pairs_keep_a_tier_of_their_own():
    assert [row.tier for row in Evaluation([score("a", "paired", 1.0)]).tiers()] == ["paired"]


def test_the_headline_is_over_the_best_trivial_of_the_tier_paired():
    def row(key: str, restored: float, gaussian: float, unsharp: float, wiener: float) -> Score:
        others = {"gaussian": {"psnr": gaussian}, "unsharp": {"psnr": unsharp}, "wiener": {"psnr": wiener}}
        return Score(key, "severe", 40.0, {"psnr": 20.0}, {"psnr": restored}, others)

    rows = [row("a", 21.0, 20.5, 19.0, 30.0), row("b", 20.2, 20.3, 20.6, 30.0)]
    (summary,) = Evaluation(rows).tiers()
    assert summary.trivial == "gaussian"  # on average over the tier: not the best of each pair
    assert summary.over_trivial == pytest.approx((0.5 - 0.1) / 2)
    assert summary.gain == pytest.approx(0.6)
    assert (summary.over_low, summary.over_high) == (pytest.approx(-0.1), pytest.approx(0.5))
    assert summary.yardsticks["wiener"] == {"psnr": 30.0}  # the kernel is known to it: a bound, and not a rival
    assert summary.record()["yardsticks"] == summary.yardsticks
    worse = Evaluation([row("a", 21.0, 19.0, 19.5, 30.0), row("b", 20.2, 19.0, 19.0, 30.0)]).tiers()[0]
    assert (worse.trivial, worse.over_trivial) == ("input", pytest.approx(worse.gain))


def test_a_yardstick_that_not_every_pair_has_is_no_mean_of_the_tier():
    first = Score("a", "severe", 40.0, {"psnr": 20.0}, {"psnr": 21.0}, {"gaussian": {"psnr": 25.0}})
    (summary,) = Evaluation([first, Score("b", "severe", 40.0, {"psnr": 20.0}, {"psnr": 21.0})]).tiers()
    assert (summary.trivial, summary.yardsticks) == ("input", {})
