"""Losses: exact values, one scale for every size, fp32 under autocast, feature losses that fall on a fixed batch."""

import math

import numpy as np
import pytest
import scipy.ndimage
import skimage.data
import torch
import torch.nn.functional as F

from model.statistics import FeatureStatistics
from model.teacher import Teacher
from tests.model.models import deblurrer
from train.config.file import configure
from train.config.schema import LossSection
from train.objective.cross_level import CrossLevelFeatureLoss
from train.objective.restoration import TERMS, RestorationLoss, charbonnier, edge, frequency_l1, l1, psnr


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(seed: int, channels=(6, 8), scale: float = 1.0) -> list[torch.Tensor]:
    return [scale * noise(2, c, 16 >> level, 24 >> level, seed=seed + level) for level, c in enumerate(channels)]


def calibrated(channels=(6, 8), **weights) -> CrossLevelFeatureLoss:
    loss = CrossLevelFeatureLoss(channels, LossSection(**weights))
    loss.calibrate([features(100, channels), features(200, channels)])
    return loss


def test_pixel_losses_have_their_defining_values():
    a, b = torch.zeros(1, 3, 4, 5), torch.full((1, 3, 4, 5), 0.2)
    assert float(l1(a, b)) == pytest.approx(0.2)
    assert float(charbonnier(a, b)) == pytest.approx(math.sqrt(0.04 + 1e-6))
    assert float(charbonnier(a, a)) == pytest.approx(1e-3)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 6), (1, 1), (2, 3)])
def test_half_a_spectrum_gives_the_mean_over_the_whole(size):
    a, b = noise(2, 3, *size), noise(2, 3, *size, seed=1)
    whole = torch.view_as_real(torch.fft.fft2(a - b, norm="ortho")).abs().mean()
    torch.testing.assert_close(frequency_l1(a, b), whole)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (2, 3)])
def test_the_edge_term_is_the_laplacian_pyramid_s_finest_level(size):
    """Against SciPy, image by image: the level of each, then their difference."""
    a, b = noise(2, 3, *size), noise(2, 3, *size, seed=1)
    line = np.array([0.05, 0.25, 0.4, 0.25, 0.05])
    kernel = np.outer(line, line)

    def level(image: np.ndarray) -> np.ndarray:
        kept = np.zeros(size)
        kept[::2, ::2] = 4 * scipy.ndimage.correlate(image, kernel, mode="nearest")[::2, ::2]
        return image - scipy.ndimage.correlate(kept, kernel, mode="nearest")

    levels = [[level(plane) for plane in image.double().flatten(0, 1).numpy()] for image in (a, b)]
    expected = np.sqrt((np.array(levels[0]) - np.array(levels[1])) ** 2 + 1e-6).mean()
    assert float(edge(a, b)) == pytest.approx(expected, rel=1e-5)


def test_the_psnr_term_weighs_every_sample_by_its_own_error():
    sharp = torch.zeros(2, 3, 4, 5)
    restored = sharp.clone()
    restored[0], restored[1] = 0.1, 0.01  # 20 dB and 40 dB
    restored.requires_grad_()
    value = psnr(restored, sharp)
    assert float(value.detach()) == pytest.approx(-30, abs=1e-2)
    value.backward()
    # d(10·log₁₀ mse)/dx = 20/(ln 10 · x · pixels): a tenth of the error, ten times the gradient.
    ratio = restored.grad[1].mean() / restored.grad[0].mean()
    assert float(ratio) == pytest.approx(10, rel=1e-3)
    assert float(psnr(sharp, sharp)) == pytest.approx(-80)


def test_no_term_has_the_name_of_another_part_of_the_record():
    others = {"pixel", "structure", "context", "logits", "cached", "cfl_weight", "loss", "lr", "grad_norm", "seconds"}
    assert not others & TERMS.keys()


@pytest.mark.parametrize("name", TERMS)
def test_every_term_of_the_table_keeps_the_contract(name):
    """A row is all that a new term needs: this runs over the table."""
    term = TERMS[name]
    a, b = noise(2, 3, 32, 33), noise(2, 3, 32, 33, seed=1).requires_grad_()
    value = term(b, a)
    assert (value.shape, value.dtype) == ((), torch.float32)
    assert float(term(a, a)) < 0.01 * float(value.detach())
    value.backward()
    assert torch.isfinite(b.grad).all()
    term(a.requires_grad_(), a.detach().clone()).backward()
    assert torch.isfinite(a.grad).all()  # a perfect restoration too
    small, large = (term(2 * noise(4, 3, n, n), torch.zeros(4, 3, n, n)) for n in (32, 128))
    assert float(large / small) == pytest.approx(1, abs=0.05)
    key = "loss.frequency" if name == "frequency" else f"loss.terms.{name}"
    weighed = RestorationLoss(configure(["loss.pixel=l1", "loss.frequency=0", f"{key}=0.5"]).loss)
    restored, sharp = (noise(1, 3, 16, 16),), noise(1, 3, 16, 16, seed=1)
    total, parts = weighed(restored, sharp)
    assert float(total) == pytest.approx(float(parts["pixel"] + 0.5 * parts[name]))
    assert RestorationLoss(LossSection(pixel=name))(restored, sharp)[1]["pixel"] == parts[name]


def test_losses_do_not_grow_with_the_channels():
    one, many = calibrated((6,)), calibrated((60,))
    values = [float(one(features(1, (6,)), features(2, (6,)))[1]["structure"])]
    values += [float(many(features(1, (60,)), features(2, (60,)))[1]["structure"])]
    assert values[1] / values[0] == pytest.approx(1, abs=0.1)


def test_the_total_is_the_weighted_sum_of_detached_parts():
    restored, sharp = noise(2, 3, 16, 16).requires_grad_(), noise(2, 3, 16, 16, seed=1)
    total, parts = RestorationLoss(LossSection(pixel="l1", frequency=0.5))((restored,), sharp)
    assert float(total.detach()) == pytest.approx(float(parts["pixel"] + 0.5 * parts["frequency"]))
    assert not any(p.requires_grad for p in parts.values())
    assert RestorationLoss(LossSection(pixel="l1", frequency=0))((restored,), sharp)[1].keys() == {"pixel"}
    loss = calibrated(structure=2.0, context=0.5)
    total, parts = loss(features(1), features(2))
    assert float(total) == pytest.approx(float(2 * parts["structure"] + 0.5 * parts["context"]))


def test_smaller_outputs_are_compared_with_the_sharp_image_sampled_bilinearly():
    sharp = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    half, quarter = F.avg_pool2d(sharp, 2), F.avg_pool2d(sharp[:, :, 1:-1, 1:-1], 2, stride=4)  # the middle 2×2 of 4×4
    total, _ = RestorationLoss(LossSection(pixel="l1"))((quarter, half, sharp), sharp)
    assert float(total) == pytest.approx(0, abs=1e-6)


def test_all_outputs_are_learned_from_each_with_weight_one():
    sharp = torch.zeros(1, 3, 16, 16)
    outputs = [torch.full((1, 3, n, n), v, requires_grad=True) for n, v in ((4, 0.3), (8, 0.2), (16, 0.1))]
    total, parts = RestorationLoss(LossSection(pixel="l1", frequency=0))(outputs, sharp)
    assert float(total.detach()) == pytest.approx(0.6)
    assert float(parts["pixel"]) == pytest.approx(0.6)
    total.backward()
    assert [float(out.grad.sum()) for out in outputs] == pytest.approx([1, 1, 1])


def test_arithmetic_is_fp32_under_autocast():
    restored, sharp = noise(1, 3, 16, 16).bfloat16(), noise(1, 3, 16, 16, seed=1)
    r, t = [f.bfloat16() for f in features(1)], features(2)
    restoration, cfl = RestorationLoss(LossSection()), calibrated()
    expected = restoration((restored.float(),), sharp)[0], cfl([f.float() for f in r], t)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = restoration((restored,), sharp)[0], cfl(r, t)[0]
        alike = cfl.similarity(r, t)
    assert got[0].dtype == got[1].dtype == alike.dtype == torch.float32
    assert torch.equal(torch.stack(got), torch.stack(expected))


def test_the_structure_term_is_the_hierarchical_mean_of_standardised_differences():
    loss = calibrated((6,), context=0)
    r, t = features(1, (6,)), features(2, (6,))
    mean, std = loss.statistics.moments(0)
    d = (r[0] - mean) / std - (t[0] - mean) / std
    pooled = [d, *(F.adaptive_avg_pool2d(d, g) for g in (4, 2, 1))]
    expected = sum(2.0**-k * p.square().mean() for k, p in enumerate(pooled)) / sum(2.0**-k for k in range(4))
    torch.testing.assert_close(loss(r, t)[0], expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 2), (4, 4)])
def test_levels_of_any_size_are_pooled_as_far_as_they_go(size):
    loss = calibrated((6,))
    r, t = [noise(2, 6, *size)], [noise(2, 6, *size, seed=1)]
    total, _ = loss(r, t)
    assert torch.isfinite(total)
    assert float(loss(t, t)[0]) == pytest.approx(0, abs=1e-6)


def test_standardisation_makes_scale_and_offset_of_the_teacher_irrelevant():
    plain, scaled = CrossLevelFeatureLoss((6, 8), LossSection()), CrossLevelFeatureLoss((6, 8), LossSection())
    change = lambda fs: [50 * f - 7 for f in fs]  # noqa: E731
    plain.calibrate([features(100)])
    scaled.calibrate([change(features(100))])
    torch.testing.assert_close(plain(features(1), features(2))[0], scaled(change(features(1)), change(features(2)))[0])


def test_calibration_is_the_moments_of_all_batches_and_travels_in_the_state_dict():
    batches = [features(100), features(200), features(300)]
    loss, other = CrossLevelFeatureLoss((6, 8), LossSection()), CrossLevelFeatureLoss((6, 8), LossSection())
    loss.calibrate(batches)
    everything = torch.cat([b[1] for b in batches]).double()
    mean, std = loss.statistics.moments(1)
    torch.testing.assert_close(mean.flatten().double(), everything.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(std.flatten().double(), everything.std((0, 2, 3), correction=0), rtol=1e-6, atol=1e-7)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(features(1), features(2))[0], loss(features(1), features(2))[0])


def test_a_dead_channel_does_not_blow_the_loss_up():
    batch = features(100, (6,))
    batch[0][:, 2] = 3.0
    loss = CrossLevelFeatureLoss((6,), LossSection(context=0))
    loss.calibrate([batch])
    r = [batch[0].clone()]
    r[0][:, 2] += 1e-3
    assert float(loss(r, batch)[0]) < 0.1


def test_similarity_is_per_level_and_one_for_the_teacher_itself():
    loss = calibrated()
    t = features(2)
    torch.testing.assert_close(loss.similarity(t, t), torch.ones(2))
    mixed = loss.similarity([t[0], features(9)[1]], t)
    assert mixed[0] > 0.999
    assert abs(float(mixed[1])) < 0.2


def test_unusable_input_is_refused_in_one_line():
    for build, words in (
        (lambda: CrossLevelFeatureLoss((6, 8), LossSection())(features(1), features(2)), "call calibrate"),
        (lambda: CrossLevelFeatureLoss((6, 8), LossSection()).calibrate([]), "no features"),
        (lambda: calibrated()(features(1)[:1], features(2)), "do not match"),
        (lambda: CrossLevelFeatureLoss((6, 8), LossSection(logits=1.0)), r"classify=teacher\.logits"),
        (lambda: RestorationLoss(LossSection(pixel="l1x")), r"unknown loss\.pixel 'l1x': did you mean l1"),
        (lambda: RestorationLoss(LossSection(terms={"edges": 1})), "unknown term in loss.terms 'edges'"),
        (lambda: RestorationLoss(LossSection(terms={"frequency": 1})), "set that"),
        (lambda: FeatureStatistics((6,)).update(features(1)), "were given"),
        (
            lambda: CrossLevelFeatureLoss((6,), LossSection()).calibrate([[torch.full((1, 6, 2, 2), math.nan)]]),
            "not finite",
        ),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            build()
        assert "\n" not in str(caught.value)


def test_feature_losses_fall_and_similarity_rises_on_a_fixed_batch():
    corners = (("chelsea", 90, 130), ("astronaut", 40, 180), ("coffee", 120, 200), ("chelsea", 150, 250))
    crops = [torch.from_numpy(getattr(skimage.data, n)()[y : y + 64, x : x + 64]) for n, y, x in corners]
    sharp = torch.stack(crops).permute(0, 3, 1, 2).float() / 255
    blurry = F.avg_pool2d(F.pad(sharp, (7, 7, 0, 0), mode="replicate"), (1, 15), stride=1)
    teacher = Teacher()
    model = deblurrer(backbone={"name": "unet", "width": 8, "blocks": [1, 1, 1]}, student={"width": 16})
    loss = CrossLevelFeatureLoss(teacher.channels, LossSection(logits=0.1), classify=teacher.logits)
    target = teacher(sharp)
    loss.calibrate([target])
    model.calibrate(loss.statistics, [blurry])
    optimizer = torch.optim.Adam(model.prior.parameters(), lr=1e-4)
    history, alike = [], [loss.similarity(model(blurry, prior_only=True).prior, target)]
    for _ in range(10):
        total, parts = loss(model(blurry, prior_only=True).prior, target)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(parts)
    alike.append(loss.similarity(model(blurry, prior_only=True).prior, target))
    for name in ("structure", "context", "logits"):
        assert history[-1][name] < 0.7 * history[0][name], name
    assert bool((alike[1] > alike[0]).all())
    assert all(p.grad is None for p in teacher.parameters())
