"""Severity of a motion blur: its extent in px, the four tiers of it, and the input PSNR."""

import math

import cv2
import numpy as np

# Lower edge of every tier, px at the training resolution. They are constants and not settings, so that "gain on the
# severe tier" means the same thing in every report; a config chooses ranges inside them and their shares.
TIER_EDGES: dict[str, float] = {"mild": 0.0, "moderate": 15.0, "severe": 30.0, "extreme": 80.0}
TIERS: tuple[str, ...] = ("identity", *TIER_EDGES)

# Stands for the PSNR of two equal pictures where a number must stay finite (JSON has no infinity).
PSNR_CAP = 100.0


def severity_of(extent: float) -> str:
    """Tier of a blur of `extent` px (larger side of the trajectory's bounding box): identity, mild, …, extreme.

    Raises ValueError for a negative or not finite extent.
    """
    if not math.isfinite(extent) or extent < 0:
        raise ValueError(f"extent {extent}: must be a finite number of px, 0 or more")
    if extent == 0:
        return "identity"
    return max((tier for tier in TIER_EDGES if extent >= TIER_EDGES[tier]), key=TIER_EDGES.__getitem__)


def tier_bounds(tier: str) -> tuple[float, float]:
    """Extents [low, high) in px that `severity_of` calls `tier`. Raises ValueError for an unknown tier or identity."""
    if tier not in TIER_EDGES:
        raise ValueError(f"tier {tier!r}: must be one of {', '.join(TIER_EDGES)}")
    edges = [*TIER_EDGES.values(), math.inf]
    place = list(TIER_EDGES).index(tier)
    return edges[place], edges[place + 1]


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """PSNR in dB between two uint8 pictures [H, W, C] or [H, W] of one shape; inf when they are equal.

    Raises ValueError when shapes differ, a picture is empty, or a dtype is not uint8.
    """
    if first.dtype != np.uint8 or second.dtype != np.uint8:
        raise ValueError(f"psnr of {first.dtype} and {second.dtype}: give two uint8 pictures")
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"psnr of shapes {first.shape} and {second.shape}: give two pictures of one, non-empty shape")
    # cv2.norm accumulates squares in exact integers blockwise; flattening admits any number of channels.
    squares = cv2.norm(
        np.ascontiguousarray(first).reshape(-1), np.ascontiguousarray(second).reshape(-1), cv2.NORM_L2SQR
    )
    return math.inf if squares == 0 else 10.0 * math.log10(255.0**2 * first.size / squares)
