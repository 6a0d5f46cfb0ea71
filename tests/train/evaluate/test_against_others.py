"""Every metric against an implementation that shares no code with ours, on 20 random pairs of pictures.

`python -m tests.train.evaluate.test_against_others` prints the largest differences, which docs/METRICS.md records.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from model.teacher import Teacher
from train.evaluate.metrics import METRICS, measured

PAIRS = 20


@lru_cache(maxsize=1)
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """(restored, sharp) uint8 [H, W, 3] of sizes odd and even: smooth random pictures, blurred and noisy."""
    rng = np.random.Generator(np.random.Philox(16))
    made = []
    for number in range(PAIRS):
        height, width = (int(n) for n in rng.integers(33, 97, 2))
        sharp = ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (1.5, 1.5, 0)) * 400 + rng.uniform(60, 190)
        blurry = ndimage.gaussian_filter(sharp, ((number + 3) / 8, (number + 3) / 8, 0)) + rng.normal(
            size=sharp.shape
        ) * (number % 5)
        made.append(tuple(np.clip(np.rint(image), 0, 255).astype(np.uint8) for image in (blurry, sharp)))
    return made


def ours(name: str) -> list[float]:
    def batch(image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(image.transpose(2, 0, 1).copy())[None]

    return [measured(batch(restored), batch(sharp), [name])[0][name] for restored, sharp in pairs()]


def skimage_ssim(restored: np.ndarray, sharp: np.ndarray) -> float:
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return structural_similarity(restored, sharp, **window, channel_axis=2, data_range=255)


def matlab_ssim(restored: np.ndarray, sharp: np.ndarray) -> float:
    """MATLAB's ssim of H×W×3, from its formula: the whole 11×11×11 window at once, and no separable step."""
    axis = np.arange(-5, 6)
    window = np.exp(-(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    a, b = restored.astype(np.float64), sharp.astype(np.float64)
    mean = {name: ndimage.convolve(v, window, mode="nearest") for name, v in
            {"a": a, "b": b, "aa": a * a, "bb": b * b, "ab": a * b}.items()}  # fmt: skip
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean["a"] * mean["b"] + c1) * (2 * (mean["ab"] - mean["a"] * mean["b"]) + c2)
    bottom = (mean["a"] ** 2 + mean["b"] ** 2 + c1) * (mean["aa"] - mean["a"] ** 2 + mean["bb"] - mean["b"] ** 2 + c2)
    return float((top / bottom).mean())


def matlab_ssim_by_loops(restored: np.ndarray, sharp: np.ndarray) -> float:
    """The same, place by place and tap by tap."""
    a, b = restored.astype(np.float64), sharp.astype(np.float64)
    taps = [math.exp(-(k**2) / (2 * 1.5**2)) for k in range(-5, 6)]
    total = sum(taps) ** 3
    values = []
    for place in np.ndindex(a.shape):
        sums = np.zeros(5)
        for offset in np.ndindex(11, 11, 11):
            at = tuple(min(max(p + o - 5, 0), n - 1) for p, o, n in zip(place, offset, a.shape, strict=True))
            weight = taps[offset[0]] * taps[offset[1]] * taps[offset[2]] / total
            x, y = a[at], b[at]
            sums += weight * np.array([x, y, x * x, y * y, x * y])
        x, y, xx, yy, xy = sums
        c1, c2 = 6.5025, 58.5225
        values.append(
            (2 * x * y + c1) * (2 * (xy - x * y) + c2) / ((x * x + y * y + c1) * (xx - x * x + yy - y * y + c2))
        )
    return float(np.mean(values))


def gradient_similarity(restored: np.ndarray, sharp: np.ndarray) -> np.ndarray:
    """The authors' GMSD.m with scipy's convolution in the place of conv2(…, 'same')."""
    from scipy.signal import convolve2d

    prewitt = np.array([[1, 0, -1]] * 3) / 3
    magnitudes = []
    for image in (restored, sharp):
        luma = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
        # conv2 'same' of an even window keeps rows 2 … n + 1 of the full result.
        mean = convolve2d(luma, np.full((2, 2), 0.25), mode="full")[1:, 1:]
        half = mean[::2, ::2]
        magnitudes.append(np.hypot(*(convolve2d(half, w, mode="same") for w in (prewitt, prewitt.T))))
    first, second = magnitudes
    return (2 * first * second + 170) / (first**2 + second**2 + 170)


def lite0_distance(restored: np.ndarray, sharp: np.ndarray) -> float:
    """From timm's own features: stage by stage, place by place normalised with numpy."""
    teacher = lite0()
    images = [torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32) / 255) for image in (restored, sharp)]
    levels = zip(*(teacher(image) for image in images), strict=True)
    total = 0.0
    for pair in levels:
        first, second = (level[0].numpy().astype(np.float64).reshape(level.shape[1], -1) for level in pair)
        first, second = first / np.linalg.norm(first, axis=0), second / np.linalg.norm(second, axis=0)
        total += (2 - 2 * (first * second).sum(0)).mean()  # |u − v|² of unit vectors
    return total


def crete_blur(restored: np.ndarray, sharp: np.ndarray) -> float:
    """The paper's steps with scipy's convolutions: gradients before and after a box of 11 px along each axis."""
    from scipy.ndimage import convolve, convolve1d

    luma = (restored.astype(np.float64) / 255) @ np.array([0.2125, 0.7154, 0.0721])
    across, along = np.array([1.0, 2.0, 1.0]) / 4, np.array([1.0, 0.0, -1.0]) / 2
    values = []
    for axis in (0, 1):
        window = np.outer(along, across) if axis == 0 else np.outer(across, along)
        low = convolve1d(luma, np.full(11, 1 / 11), axis=axis)
        before, after = (np.abs(convolve(image, window))[2:-1, 2:-1] for image in (luma, low))
        values.append((before.sum() - np.maximum(0, before - after).sum()) / before.sum())
    return max(values)


def shared_classes(restored: np.ndarray, sharp: np.ndarray) -> float:
    """From PIL's resizing of floating-point planes, timm's numbers and a softmax in fp64."""
    from PIL import Image

    network = lite2().encoder.net
    facts = network.pretrained_cfg
    side, mean, std = facts["input_size"][-1], np.array(facts["mean"]), np.array(facts["std"])
    shorter = math.floor(side / facts["crop_pct"])
    probabilities = []
    for image in (restored, sharp):
        height, width = (round(length * shorter / min(image.shape[:2])) for length in image.shape[:2])
        planes = [Image.fromarray(plane.astype(np.float32) / 255) for plane in image.transpose(2, 0, 1)]
        large = np.stack([np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes], -1)
        top, left = (height - side) // 2, (width - side) // 2
        seen = (large.clip(0, 1)[top : top + side, left : left + side] - mean) / std
        logits = network(torch.from_numpy(seen.transpose(2, 0, 1)[None].astype(np.float32)))[0].double().numpy()
        probabilities.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
    return float(1 - np.abs(probabilities[0] - probabilities[1]).sum() / 2)


@lru_cache(maxsize=1)
def lite0() -> Teacher:
    return Teacher("efficientnet_lite0", precision="fp32")


@lru_cache(maxsize=1)
def lite2() -> Teacher:
    return Teacher("efficientnet_lite2", precision="fp32")


OTHERS = {
    "psnr": lambda restored, sharp: peak_signal_noise_ratio(sharp, restored, data_range=255),
    "ssim": skimage_ssim,
    "ssim_3d": matlab_ssim,
    "gms": lambda restored, sharp: gradient_similarity(restored, sharp).mean(),
    "gmsd": lambda restored, sharp: gradient_similarity(restored, sharp).std(ddof=1),
    "features": lite0_distance,
    "blur": crete_blur,
    "classes": shared_classes,
}
BOUNDS = dict.fromkeys(OTHERS, 1e-10) | {"features": 1e-5, "classes": 1e-4}


def largest_difference(name: str) -> float:
    return max(abs(mine - OTHERS[name](*pair)) for mine, pair in zip(ours(name), pairs(), strict=True))


@pytest.mark.parametrize("name", OTHERS)
def test_a_metric_equals_an_independent_implementation(name):
    assert largest_difference(name) < BOUNDS[name]
    assert max(ours(name)) - min(ours(name)) > 0.01  # the pairs tell good from bad


def test_ssim_3d_equals_matlabs_formula_in_plain_loops():
    restored, sharp = (np.ascontiguousarray(image[:7, :8]) for image in pairs()[9])
    slow = matlab_ssim_by_loops(restored, sharp)
    assert matlab_ssim(restored, sharp) == pytest.approx(slow, abs=1e-12)
    batch = (torch.from_numpy(image.transpose(2, 0, 1).copy())[None] for image in (restored, sharp))
    assert METRICS["ssim_3d"].measure(*batch).item() == pytest.approx(slow, abs=1e-12)


if __name__ == "__main__":
    for name in OTHERS:
        print(f"{name:9s} {largest_difference(name):.1e}")
