"""Pairs: rules 2, 4, 6 and 8 of blur synthesis, tiers, identity, and the errors a user meets."""

import json
import subprocess
import sys

import numpy as np
import pytest

from data.blur import BlurConfig, pair_from_seed, psnr, sample_rng, severity_of, synthesize_pair

QUIET = {
    "curves": {"srgb": 1},
    "highlight_boost": [0, 0],
    "noise": {"shot": 0, "read": 0},
    "jpeg": {"probability": 0},
}


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A photograph-like picture: noise at every scale, [H, W, 3] uint8."""
    rng = sample_rng(seed, 0, "texture", 0)
    total = np.zeros((height, width, 3))
    for step in (1, 2, 4, 8, 16, 32, 64):
        coarse = rng.standard_normal((height // step + 2, width // step + 2, 3))
        total += step**0.7 * coarse.repeat(step, 0).repeat(step, 1)[:height, :width]
    total = (total - total.mean()) / total.std()
    return np.clip(120 + 45 * total, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return texture(420, 500)


def quiet(**over) -> BlurConfig:
    return BlurConfig(photometry=QUIET, **over)


def test_ground_truth_is_the_crop_itself_and_meta_is_json(photo):
    pair = synthesize_pair(photo, (60, 80, 128), sample_rng(1, 2, "a", 3), BlurConfig(), tier="severe")
    assert np.array_equal(pair.sharp, photo[60:188, 80:208])
    assert pair.blurry.shape == pair.sharp.shape
    assert pair.blurry.dtype == pair.sharp.dtype == np.uint8
    assert json.loads(json.dumps(pair.meta, allow_nan=False)) == pair.meta
    assert pair.meta["tier"] == severity_of(pair.meta["extent"]) == "severe"
    assert pair.meta["input_psnr"] == pytest.approx(psnr(pair.blurry, pair.sharp))
    assert not np.shares_memory(pair.sharp, photo)


def test_flip_mirrors_sharp_and_blurry_together(photo):
    box = (60, 80, 128)
    pair = synthesize_pair(photo, box, sample_rng(1, 2, "a", 3), quiet(), tier="moderate", flip=True)
    assert np.array_equal(pair.sharp, photo[60:188, 80:208][:, ::-1])
    same = synthesize_pair(
        np.ascontiguousarray(photo[:, ::-1]),
        (60, 500 - 80 - 128, 128),
        sample_rng(1, 2, "a", 3),
        quiet(),
        tier="moderate",
    )
    assert np.array_equal(pair.blurry, same.blurry)


def test_same_name_same_pair_another_name_another_pair(photo):
    box, config = (40, 50, 96), BlurConfig()
    one = synthesize_pair(photo, box, sample_rng(5, 1, "key", 0), config)
    np.random.seed(0)
    two = synthesize_pair(photo, box, sample_rng(5, 1, "key", 0), config)
    assert np.array_equal(one.blurry, two.blurry)
    assert one.meta == two.meta
    for other in (
        sample_rng(6, 1, "key", 0),
        sample_rng(5, 2, "key", 0),
        sample_rng(5, 1, "kez", 0),
        sample_rng(5, 1, "key", 1),
    ):
        assert synthesize_pair(photo, box, other, config).meta["seed"] != one.meta["seed"]
    again = pair_from_seed(photo, box, one.meta["seed"], config)
    assert np.array_equal(again.blurry, one.blurry)


def test_random_numbers_are_the_same_in_another_process():
    code = "from data.blur import sample_rng; print(sample_rng(3, 4, 'sample_7', 2).bytes(16).hex())"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "99"}
    ).stdout.strip()
    assert out == sample_rng(3, 4, "sample_7", 2).bytes(16).hex()
