"""The batched torch path makes the CPU path's pairs, on any device."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.blur import BlurConfig, plan_pair, sample_rng
from data.blur import photometry as camera
from data.blur.attempt import draw_attempt
from data.blur.batched import blurred_light_batch, pairs_of_plans, render_batch
from data.blur.batched_jpeg import jpeg_batch
from data.blur.pair import blurred_light, pair_of_plan, render
from data.image import psnr
from tests.data.blur.test_pair import GENERATORS, texture

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.clip(texture(380, 360).astype(int) * 3 // 2, 0, 255).astype(np.uint8)  # with clipped highlights


def plans_of(photo, config=None, size=96, count=2, tier=None):
    made = []
    for i, generator in enumerate(GENERATORS * count):
        chosen = config or BlurConfig(generators={generator: 1})
        seed = sample_rng(i, 0, generator, 0).bytes(16).hex()
        made.append(plan_pair(photo, (100 + i, 120 - i, size), seed, chosen, flip=bool(i % 2), tier=tier))
    return made


@pytest.mark.parametrize("device", DEVICES)
def test_light_of_every_generator_equals_the_cpu_path(photo, device):
    attempts = [draw_attempt(plan, 0) for plan in plans_of(photo)]
    batch = blurred_light_batch(attempts, device).cpu().numpy()
    for attempt, light in zip(attempts, batch, strict=True):
        assert np.abs(light - np.stack(blurred_light(attempt), axis=-1)).max() < 1e-3, attempt.recipe.generator


def without_jpeg(attempt):
    camera_facts = replace(attempt.recipe.photometry, jpeg_quality=None)
    return replace(attempt, recipe=replace(attempt.recipe, photometry=camera_facts))


@pytest.mark.parametrize("device", DEVICES)
def test_pictures_equal_the_cpu_path_noise_included(photo, device):
    attempts = [without_jpeg(draw_attempt(plan, 0)) for plan in plans_of(photo)]
    assert any(attempt.recipe.photometry.denoise is not None for attempt in attempts)
    assert any(attempt.lamps is not None for attempt in attempts)
    batch = render_batch(attempts, device).cpu().numpy()
    for attempt, codes in zip(attempts, batch, strict=True):
        difference = np.abs(codes.astype(int) - render(attempt))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_the_batch_draws_again_and_records_as_the_cpu_path(photo, device):
    config = BlurConfig(
        photometry={"jpeg": {"probability": 0}, "isp": {"share": 0}},
        tiers={"severe": {"psnr": [15.2, 16.0]}},
        max_attempts=3,
    )
    plans = plans_of(photo, config, size=64, tier="severe")
    first = [draw_attempt(plan, 0) for plan in plans]
    pairs = pairs_of_plans(plans, device, first)
    alone = [pair_of_plan(plan) for plan in plans]
    assert len({pair.meta["attempts"] for pair in alone}) > 1
    for one, two in zip(pairs, alone, strict=True):
        assert one.blurry.dtype == one.sharp.dtype == torch.uint8
        assert one.meta.pop("input_psnr") == pytest.approx(two.meta.pop("input_psnr"), abs=0.02)
        assert one.meta == two.meta
        assert np.array_equal(one.sharp.cpu().numpy(), two.sharp)
        assert np.array_equal(one.kernel, two.kernel)


@pytest.mark.parametrize("quality", [30, 60, 75, 90, 98])
def test_batched_jpeg_loses_what_the_codec_loses(photo, quality):
    picture = np.ascontiguousarray(photo[:99, :83])  # sides that are no multiple of 16
    codec = camera.jpeg(picture, quality)
    ours = jpeg_batch(torch.from_numpy(picture)[None], [quality])[0].numpy()
    assert np.abs(ours.astype(int) - codec).mean() < 0.6
    assert psnr(ours, codec) > psnr(codec, picture) + 6
    assert psnr(ours, picture) == pytest.approx(psnr(codec, picture), abs=0.15)


def test_jpeg_qualities_are_applied_sample_by_sample(photo):
    picture = torch.from_numpy(np.ascontiguousarray(photo[:64, :64]))
    both = jpeg_batch(torch.stack([picture, picture]), [30, 95])
    assert torch.equal(both[0], jpeg_batch(picture[None], [30])[0])
    assert torch.equal(both[1], jpeg_batch(picture[None], [95])[0])


def test_crops_of_two_sizes_are_refused(photo):
    plans = [*plans_of(photo, size=32, count=1)[:1], *plans_of(photo, size=48, count=1)[:1]]
    with pytest.raises(ValueError, match="crops of 32, 48 px"):
        pairs_of_plans(plans, "cpu")
    assert pairs_of_plans([], "cpu") == []
