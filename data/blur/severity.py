"""Severity of a motion blur: its extent in px, and the four tiers of it."""

import math

# Lower edge of every tier, px at the training resolution. They are constants and not settings, so that "gain on the
# severe tier" means the same thing in every report; a config chooses ranges inside them and their shares.
TIER_EDGES: dict[str, float] = {"mild": 0.0, "moderate": 15.0, "severe": 30.0, "extreme": 80.0}
TIERS: tuple[str, ...] = ("identity", *TIER_EDGES)

# px: beyond it a crop holds nothing of what it shows, and a camera that turns so far no longer sees the same scene.
LARGEST_EXTENT = 320.0

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
