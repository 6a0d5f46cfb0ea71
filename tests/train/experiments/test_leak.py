"""A validation picture in the training set is found by what it shows: scaled, compressed, mirrored, renamed."""

import cv2
import numpy as np
import pytest

from train.experiments.leak import NEAR, fingerprint


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
    for copy in (jpeg(image, 30), half, brighter):
        assert (fingerprint(image) != fingerprint(copy)).sum() <= NEAR
    assert (fingerprint(image) != fingerprint(picture(seed + 100))).sum() > 3 * NEAR
