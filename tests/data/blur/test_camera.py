"""What cameras and phones do: lamps that draw trails, and a phone's processing."""

import numpy as np
import pytest

from data.blur import BlurConfig, sample_rng, synthesize_pair
from data.blur import photometry as camera
from data.blur.isp import develop, sharpen
from tests.data.blur.test_pair import QUIET


def night(gain: list[float] | None, size: int = 2) -> np.ndarray:
    """Linear light of a lamp of size² px seen through a straight pan of 40 px."""
    photo = np.full((200, 200, 3), 10, np.uint8)
    photo[99 : 99 + size, 99 : 99 + size] = 255
    trails = {"share": 1, "gain": gain} if gain else {"share": 0}
    config = BlurConfig(
        generators={"linear": 1},
        tiers={"severe": {"extent": [40, 40], "psnr": [0, 99]}},
        photometry=QUIET | {"trails": trails},
        defocus={"share": 0},
    )
    pair = synthesize_pair(photo, (50, 50, 100), sample_rng(0, 0, "n", 0), config, tier="severe")
    return camera.decode(pair.blurry, camera.response_curve("srgb"))


def test_a_lamp_draws_its_path_as_bright_as_its_gain_says_and_clips_at_white():
    dark = camera.decode(np.full((1, 1, 3), 10, np.uint8), camera.response_curve("srgb")).max()
    sums = {gain: (night([gain, gain]) - dark).sum() for gain in (4.0, 16.0)}
    plain = (night(None) - dark).sum()
    assert sums[4.0] / plain == pytest.approx(5, rel=0.1)
    assert sums[16.0] / plain == pytest.approx(17, rel=0.1)
    bright = night([63.0, 63.0])
    assert bright.max() == 1.0  # saturated all along the streak
    assert (bright.max(axis=2) > 0.99).sum() > 60


def test_large_bright_areas_are_no_lamps():
    photo = np.full((64, 64, 3), 100, np.uint8)
    assert camera.spots(photo) is None
    photo[:4, :4], photo[20:60, 20:60] = 255, 255
    shares = camera.spots(photo)
    assert shares[2, 2] == 1
    assert shares[40, 40] == pytest.approx(camera.SPOT / 1600)
    assert shares[10, 10] == 0


def test_developing_a_constant_gives_it_back_and_noise_is_lessened():
    flat = [np.full((32, 32), value, np.float32) for value in (0.2, 0.5, 0.7)]
    for denoise in (0.0, 0.7, 2.0):
        for plane, developed in zip(flat, develop(flat, denoise, 1e-4, 1e-3), strict=True):
            assert np.abs(developed - plane).max() < 1e-6
    rng = sample_rng(0, 0, "noise", 0)
    noisy = [plane + 0.05 * rng.standard_normal((32, 32)).astype(np.float32) for plane in flat]
    left = [
        np.mean([np.std(plane - known) for plane, known in zip(develop(noisy, d, 0.0, 0.05), flat, strict=True)])
        for d in (0.0, 1.0, 2.0)
    ]
    assert left[0] < 0.05  # demosaicking averages
    assert left[2] < left[1] < 0.8 * left[0]


def test_demosaicking_blurs_colour_and_sharpening_leaves_a_halo():
    edge = np.zeros((32, 32), np.float32)
    edge[:, 16:] = 1
    red, green, _ = develop([edge, edge, edge], 0.0, 0.0, 0.0)
    assert 0 < red[16, 15] < 0.6
    assert np.abs(green[4:28, 4:14]).max() == 0
    values = np.stack([100 * edge] * 3, axis=-1) + 50
    halo = sharpen(values, 1.0, 1.0)
    assert halo[16, 16, 0] > 160
    assert halo[16, 15, 0] < 40
    assert np.abs(halo[16, 2, 0] - 50) < 1e-3


def test_every_phone_picture_is_a_jpeg_and_its_facts_are_in_the_meta():
    photo = sample_rng(0, 0, "photo", 0).integers(0, 256, (128, 128, 3), np.uint8)
    config = BlurConfig(photometry={"isp": {"share": 1, "quality": [80, 80]}})
    meta = synthesize_pair(photo, (0, 0, 96), sample_rng(0, 0, "p", 0), config).meta
    assert meta["jpeg_quality"] == 80
    assert 0.2 <= meta["sharpen"] <= 1.2
    assert 0 <= meta["denoise"] <= 2


def test_a_raster_of_lamps_is_no_error():
    photo = np.zeros((600, 600, 3), np.uint8)
    photo[::2, ::2] = 255
    assert camera.spots(photo).max() == 1
