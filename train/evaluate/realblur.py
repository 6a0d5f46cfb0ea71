"""RealBlur's protocol (Rim et al., ECCV 2020; their evaluation script): its two cameras see a scene shifted and not
equally bright, so that the restored picture is matched in intensity and aligned before it is compared."""

from __future__ import annotations

import math
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
from skimage.metrics import structural_similarity

from data.workers import init_worker, main_not_imported_again, worker_context
from train.evaluate.fidelity import EQUAL

ITERATIONS = 100
FILTER = 5  # px: findTransformECC smooths both pictures by this window
RIM = 5  # px: what the window of SSIM does not fill


class Aligned(NamedTuple):
    """PSNR in dB and SSIM of the aligned pictures, and whether the alignment was found (else they were left where they
    are). homography: [3, 3], from places of the sharp picture to those of the restored one."""

    psnr: float
    ssim: float
    found: bool
    homography: np.ndarray


def align(sharp: np.ndarray, restored: np.ndarray) -> Aligned:
    """Compare a restored picture with the sharp one, both uint8 RGB [H, W, 3], as RealBlur's script does; float32.

    The restored one is scaled by Σxz/Σzz and warped by a homography that OpenCV's ECC finds; only places inside the
    warped picture count. PSNR is of all of them and channels (equal pictures count as 60 dB), SSIM the mean over
    channels of Σ map·mask / Σ mask, 5 px at each side left out. Take unaligned values by another name: they are 2 to
    3 dB lower. ValueError for pictures of another kind, or of unequal shapes.
    """
    for image in (sharp, restored):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape != sharp.shape or image.shape[2] != 3:
            raise ValueError(f"align of {image.dtype} {image.shape} with {sharp.shape}: give two uint8 RGB [H, W, 3]")
    x, z = (image.astype(np.float32) / 255 for image in (sharp, restored))
    energy = np.sum(z * z)
    z = z * (np.sum(x * z) / energy) if energy > 0 else z
    homography, found = _ecc(x, z)
    moved, mask = _warped(z, homography)
    if not mask.any():  # nothing of the picture is left inside
        homography, found = np.eye(3, dtype=np.float32), False
        moved, mask = _warped(z, homography)
    x, moved = x * mask, moved * mask
    error = np.sum((x - moved) ** 2, dtype=np.float64) / np.sum(mask, dtype=np.float64)
    psnr = min(-10 * math.log10(error), EQUAL) if error > 0 else EQUAL
    return Aligned(psnr, _masked_ssim(x, moved, mask), found, homography)


def _warped(z: np.ndarray, homography: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The picture as the homography places it, and 1 where it has pixels there, else 0."""
    size = (z.shape[1], z.shape[0])
    cubic, nearest = (kind | cv2.WARP_INVERSE_MAP for kind in (cv2.INTER_CUBIC, cv2.INTER_NEAREST))
    moved = cv2.warpPerspective(z, homography, size, flags=cubic, borderMode=cv2.BORDER_REFLECT)
    mask = cv2.warpPerspective(
        np.ones_like(z), homography, size, flags=nearest, borderMode=cv2.BORDER_CONSTANT, borderValue=0
    )
    return moved, mask


def _ecc(x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, bool]:
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, ITERATIONS, 0)
    grey = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (x, z))
    try:
        start = np.eye(3, dtype=np.float32)
        return cv2.findTransformECC(*grey, start, cv2.MOTION_HOMOGRAPHY, criteria, None, FILTER)[1], True
    except cv2.error:  # it does not converge, as on pictures without texture
        return np.eye(3, dtype=np.float32), False


def _masked_ssim(x: np.ndarray, z: np.ndarray, mask: np.ndarray) -> float:
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    _, whole = structural_similarity(x, z, channel_axis=2, data_range=1.0, full=True, **window)
    inner = (slice(RIM, -RIM), slice(RIM, -RIM))
    counted = mask[inner].sum(axis=(0, 1))
    return float(np.mean((whole * mask)[inner].sum(axis=(0, 1)) / np.maximum(counted, 1)))


class AlignPool:
    """`align` in worker processes, which takes seconds a picture of 680×773 px. Use as a context manager: leaving it
    waits for what was submitted."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def __enter__(self) -> AlignPool:
        self._pool = ProcessPoolExecutor(self._workers, worker_context(), init_worker)
        return self

    def submit(self, sharp: np.ndarray, restored: np.ndarray) -> Future[Aligned]:
        """Have two pictures compared: `align`, whose result or error the future has."""
        with main_not_imported_again():  # it starts its processes when there is work
            return self._pool.submit(align, sharp, restored)

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
