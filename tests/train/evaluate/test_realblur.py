"""RealBlur's protocol: a known shift and change of intensity is undone; the numbers are those of the script's steps."""

import math

import cv2
import numpy as np
import pytest
from scipy import ndimage
from skimage import data

from train.evaluate.realblur import AlignPool, align

SHAPE = (220, 260)


def scene() -> np.ndarray:
    """A photograph [H + 60, W + 60, 3] in [0, 1]."""
    return data.astronaut()[: SHAPE[0] + 60, 60 : SHAPE[1] + 120] / 255


def cut(image: np.ndarray, homography: np.ndarray, margin: int = 30) -> np.ndarray:
    """What a camera sees of the scene through a homography of its own pixels, by quintic splines."""
    rows, columns = np.indices(SHAPE).astype(np.float64)
    u, v, w = np.einsum("ij,jhw->ihw", homography, np.stack([columns, rows, np.ones_like(rows)]))
    places = np.stack([v / w + margin, u / w + margin])
    return np.stack([ndimage.map_coordinates(image[..., c], places, order=5) for c in range(3)], axis=-1)


def codes(image: np.ndarray) -> np.ndarray:
    return np.rint(255 * image.clip(0, 1)).astype(np.uint8)


def matched_psnr(sharp: np.ndarray, restored: np.ndarray, seen: np.ndarray | None = None) -> float:
    """PSNR after the change of intensity alone, of the places `seen` [H, W]."""
    x, z = (image.astype(np.float64) / 255 for image in (sharp, restored))
    z = z * (x * z).sum() / (z * z).sum()
    seen = np.ones(x.shape[:2], bool) if seen is None else seen
    return -10 * math.log10(((x - z)[seen] ** 2).mean())


# A px here and there, as RealBlur's pairs have left of their alignment.
MOVED = np.array([[1.0014, 0.0021, 1.15], [-0.0018, 0.999, -0.9], [3e-6, -2e-6, 1]])


def test_a_known_homography_and_intensity_are_undone_within_5_hundredths_of_a_decibel():
    whole, still = scene(), np.eye(3)
    poor = ndimage.gaussian_filter(whole, (2.5, 2.5, 0))  # what a network left: its error is what is to be measured
    sharp, restored, moved = codes(cut(whole, still)), codes(cut(poor, still)), codes(0.82 * cut(poor, MOVED))
    back = np.linalg.inv(MOVED)
    rows, columns = np.indices(SHAPE).astype(np.float64)
    u, v, w = np.einsum("ij,jhw->ihw", back, np.stack([columns, rows, np.ones_like(rows)]))
    seen = (u / w > 0) & (u / w < SHAPE[1] - 1) & (v / w > 0) & (v / w < SHAPE[0] - 1)
    expected, found = matched_psnr(sharp, restored, seen), align(sharp, moved)
    assert found.found
    assert found.psnr == pytest.approx(expected, abs=0.05)
    assert matched_psnr(sharp, moved) < expected - 1.5  # unaligned
    corners = np.array([[[0, 0]], [[SHAPE[1], 0]], [[0, SHAPE[0]]], [[SHAPE[1], SHAPE[0]]]], np.float64)
    undone = cv2.perspectiveTransform(cv2.perspectiveTransform(corners, found.homography.astype(np.float64)), MOVED)
    assert np.abs(undone - corners).max() < 0.3  # px


def the_scripts_steps(sharp: np.ndarray, restored: np.ndarray, homography: np.ndarray) -> tuple[float, float]:
    """PSNR and SSIM by evaluation_RealBlur_ecc.py's formulas from a given homography, by scipy; fp32 as there, which
    moves SSIM by up to 2e-4."""
    x, z = (image.astype(np.float32) / 255 for image in (sharp, restored))
    zs = (x * z).sum() / (z * z).sum() * z
    rows, columns = np.indices(x.shape[:2]).astype(np.float64)
    u, v, w = np.einsum("ij,jhw->ihw", homography.astype(np.float64), np.stack([columns, rows, np.ones_like(rows)]))
    u, v = u / w, v / w
    zr = cv2.remap(zs.astype(np.float32), u.astype(np.float32), v.astype(np.float32), cv2.INTER_CUBIC,
                   borderMode=cv2.BORDER_REFLECT)  # fmt: skip
    near = (np.rint(u) >= 0) & (np.rint(u) <= x.shape[1] - 1) & (np.rint(v) >= 0) & (np.rint(v) <= x.shape[0] - 1)
    mask = np.repeat(near[..., None], 3, axis=2).astype(np.float32)
    x, zr = x * mask, zr * mask
    psnr = 10 * math.log10(1 / (((x - zr).astype(np.float64) ** 2).sum() / mask.sum()))
    values = []
    for channel in range(3):
        a, b, m = x[..., channel], zr[..., channel], mask[..., channel]

        def mean(image):
            return ndimage.gaussian_filter(image, 1.5, truncate=3.5)

        va, vb, vab = mean(a * a) - mean(a) ** 2, mean(b * b) - mean(b) ** 2, mean(a * b) - mean(a) * mean(b)
        top = (2 * mean(a) * mean(b) + 0.01**2) * (2 * vab + 0.03**2)
        ssim = top / ((mean(a) ** 2 + mean(b) ** 2 + 0.01**2) * (va + vb + 0.03**2)) * m
        values.append(ssim[5:-5, 5:-5].sum() / m[5:-5, 5:-5].sum())
    return psnr, float(np.mean(values))


def largest_differences(pairs: int = 20) -> tuple[float, float]:
    """Of PSNR and SSIM, over random pairs, shifts and intensities."""
    rng, whole = np.random.Generator(np.random.Philox(9)), scene()
    worst = np.zeros(2)
    for _ in range(pairs):
        move = np.eye(3) + rng.normal(size=(3, 3)) * np.array([[3e-3, 3e-3, 2], [3e-3, 3e-3, 2], [5e-6, 5e-6, 0]])
        move[0, 2] += 9  # beyond the 5 px that SSIM leaves out anyway: the mask counts
        poor = ndimage.gaussian_filter(whole, (s := rng.uniform(0.5, 3), s, 0))
        sharp, restored = codes(cut(whole, np.eye(3))), codes(rng.uniform(0.8, 1.2) * cut(poor, move))
        mine = align(sharp, restored)
        assert mine.found
        worst = np.maximum(worst, np.abs(np.subtract(mine[:2], the_scripts_steps(sharp, restored, mine.homography))))
    return tuple(worst)


def test_the_numbers_are_those_of_the_scripts_steps():
    psnr, ssim = largest_differences(4)
    assert psnr < 2e-3
    assert ssim < 2e-5


def test_what_cannot_be_aligned_is_compared_as_it_is_and_said():
    flat = np.full((*SHAPE, 3), 90, np.uint8)
    found = align(codes(cut(scene(), np.eye(3))), flat)
    assert not found.found
    assert (found.homography == np.eye(3)).all()
    assert align(flat, flat)[:2] == (60.0, pytest.approx(1.0, abs=1e-6))
    assert not align(flat, np.zeros_like(flat)).found
    with pytest.raises(ValueError, match="give two uint8 RGB"):
        align(flat, flat[:-1])


def test_workers_give_the_same_numbers_and_their_own_errors():
    sharp, moved = codes(cut(scene(), np.eye(3))), codes(0.9 * cut(scene(), MOVED))
    with AlignPool(2) as pool:
        futures = [pool.submit(sharp, moved), pool.submit(sharp, moved[:-1])]
    here = align(sharp, moved)
    assert futures[0].result()[:3] == here[:3]
    with pytest.raises(ValueError, match="give two uint8 RGB"):
        futures[1].result()


if __name__ == "__main__":
    print("PSNR {:.1e} dB, SSIM {:.1e}".format(*largest_differences()))
