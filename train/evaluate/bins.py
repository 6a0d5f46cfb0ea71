"""Bins of input PSNR: the tiers of pairs whose blur nobody knows. The PSNR needs the sharp picture, so that bins are
known in evaluation and on training pairs alone."""

from __future__ import annotations

from collections.abc import Container
from itertools import pairwise

import numpy as np

EDGES = (20, 23, 26, 29, 32)  # dB of the input: fixed, so that two evaluations have the same bins
BINS = (
    f"input < {EDGES[0]} dB",
    *(f"input {low}–{high} dB" for low, high in pairwise(EDGES)),
    f"input ≥ {EDGES[-1]} dB",
)


def bin_of(psnr: float) -> str:
    """The bin of a picture whose blur nobody knows, by its input PSNR in dB."""
    return BINS[int(np.searchsorted(EDGES, psnr, side="right"))]


def nearest_bin(name: str, among: Container[str]) -> str:
    """The bin itself or its nearest neighbour that is in `among`; of two as near the one of the higher PSNR, whose
    settings do less. ValueError where none is in it."""
    place = BINS.index(name)
    found = [each for each in range(len(BINS)) if BINS[each] in among]
    if not found:
        raise ValueError(f"{name}: no bin at all to take instead")
    return BINS[min(found, key=lambda each: (abs(each - place), -each))]
