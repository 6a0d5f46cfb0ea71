"""PSNR, SSIM and intervals against values worked out by hand or by other means."""

import math

import numpy as np
import pytest
import torch

from data.image import psnr
from train.evaluate.metrics import METRICS, bootstrap_mean_interval, measured, ssim, to_uint8
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


def test_ssim_of_a_picture_with_itself_is_1_and_falls_with_noise():
    sharp = picture(0)
    noisy = np.clip(sharp.astype(int) + picture(1) // 8, 0, 255).astype(np.uint8)
    assert ssim(sharp, sharp) == pytest.approx(1.0)
    assert 0 < ssim(noisy, sharp) < 1
    assert ssim(picture(2), sharp) < ssim(noisy, sharp)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_of_the_table_keeps_the_contract(name, tmp_path):
    """A row is all that a new metric needs: this runs over the table."""
    metric, sharp = METRICS[name], picture(0)
    noisy = np.clip(sharp.astype(int) + picture(1) // 8, 0, 255).astype(np.uint8)
    same, near = measured(sharp, sharp)[name], measured(noisy, sharp)[name]
    assert all(isinstance(value, float) and math.isfinite(value) for value in (same, near))
    assert near != same
    assert (noisy == np.clip(sharp.astype(int) + picture(1) // 8, 0, 255)).all()  # the pictures are left alone
    evaluation = Evaluation([Score("a", "severe", 40.0, measured(noisy, sharp), measured(sharp, sharp))])
    (row,) = evaluation.record()["tiers"]
    assert (row[f"input_{name}"], row[f"restored_{name}"]) == (near, same)
    write_report(tmp_path / "report.md", evaluation, title="T", facts={}, before=[])
    shown = f"{near:.{metric.digits}f}", f"{same:.{metric.digits}f}"
    assert f"{shown[0]} | {shown[1]} |" in tier_table(evaluation)
    assert all(value in tier_lines(evaluation)[0] for value in shown)
    assert f"{metric.label}: {metric.note}." in (tmp_path / "report.md").read_text()


def test_to_uint8_clamps_and_rounds():
    values = torch.tensor([-1.0, 0.0, 0.499 / 255, 0.501 / 255, 254.6 / 255, 2.0])
    assert to_uint8(values.view(1, 1, 6).expand(3, 1, 6)).tolist() == [[[v] * 3 for v in (0, 0, 0, 1, 255, 255)]]
    assert to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


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
    blurry = dict.fromkeys(METRICS, 0.5) | {"psnr": 20.0}
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
