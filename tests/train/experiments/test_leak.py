"""A validation picture in the training set is found by what it shows: scaled, compressed, mirrored, renamed."""

import cv2
import numpy as np
import pytest

from train.experiments.leak import BITS, NEAR, fingerprint


def picture(seed: int) -> np.ndarray:
    """Smooth colours with a few edges."""
    generator = np.random.Generator(np.random.Philox(seed))
    small = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return cv2.resize(small, (320, 240), interpolation=cv2.INTER_CUBIC)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


@pytest.mark.parametrize("seed", range(5))
def test_copies_stay_near_and_other_pictures_far(seed):
    image = picture(seed)
    half = cv2.resize(image, (160, 120), interpolation=cv2.INTER_AREA)
    brighter = (image.astype(np.float64) * 0.8 + 40).astype(np.uint8)
    for copy in (jpeg(image, 30), half, brighter, np.ascontiguousarray(image[:, ::-1])):
        assert fingerprint(image).apart(fingerprint(copy)) <= NEAR
    assert fingerprint(image).apart(fingerprint(picture(seed + 100))) == BITS


def test_smooth_pictures_of_other_things_are_no_copies():
    y, x = np.mgrid[0:256, 0:256]
    skies = [
        np.stack([120 + y // 4, 140 + y // 5, 200 + y // 8], -1),
        np.stack([60 + x // 9, 70 + x // 7, 90 + 0 * x], -1),
        np.stack([90 + x // 5, 40 + x // 7, 30 + y // 4], -1),
    ]
    prints = [fingerprint(sky.clip(0, 255).astype(np.uint8)) for sky in skies]
    assert all(a.apart(b) > NEAR for n, a in enumerate(prints) for b in prints[:n])
