"""How the prior is compared with the teacher at one level: the project's own way, and three to compare it with.

Each is a distance of r and t, both [B, C, h, w] in fp32, as a mean: no size, channel count or batch changes its scale.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

GRIDS = (4, 2, 1)
EPS = 1e-12


class Match(NamedTuple):
    """A distance, and whether it is given standardised features or the features as they are."""

    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    standardised: bool


def hierarchical(r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return Σ_k 2^-k · mean (pool_k r − pool_k t)² / Σ_k 2^-k over k: full, and the grids 4×4, 2×2, 1×1 that are
    coarser than the level. The hierarchical context loss (Chen et al., CVPR 2021)."""
    difference = r - t
    loss, weights = difference.square().mean(), 1.0
    for k, grid in enumerate(GRIDS, start=1):
        if grid < max(difference.shape[-2:]):
            loss = loss + 2.0**-k * _pool(difference, grid).square().mean()
            weights += 2.0**-k
    return loss / weights


def squared(r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference: plain feature regression (FitNets, Romero et al., ICLR 2015)."""
    return (r - t).square().mean()


def cosine(r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return 1 − cos over the channels, mean over positions and batch: 0 to 2. Length does not matter."""
    return (1 - F.cosine_similarity(r, t, dim=1)).mean()


def attention(r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return ‖q(r)/‖q(r)‖ − q(t)/‖q(t)‖‖², q = Σ_c x_c² as one vector a sample, mean over the batch: 0 to 2.

    Activation-based attention transfer (Zagoruyko & Komodakis, ICLR 2017) with their F = Σ|A|² and, as in their code,
    the squared norm. It asks where the features are large, not what they are.
    """
    maps = (F.normalize(x.square().mean(1).flatten(1), dim=1, eps=EPS) for x in (r, t))
    first, second = maps
    return (first - second).square().sum(1).mean()


MATCHES = {
    "cross_level": Match(hierarchical, standardised=True),
    "same_level": Match(squared, standardised=True),
    "cosine": Match(cosine, standardised=True),
    "attention": Match(attention, standardised=False),
}


def _pool(x: torch.Tensor, grid: int) -> torch.Tensor:
    """Average x [B, C, h, w] over an at most grid × grid partition of its cells.

    Products with averaging matrices, because adaptive pooling's gradient is not deterministic on CUDA.
    """
    rows, columns = (_averaging(size, min(grid, size), x) for size in x.shape[-2:])
    return rows @ x @ columns.T


def _averaging(size: int, cells: int, like: torch.Tensor) -> torch.Tensor:
    """Return [cells, size]: row i averages the entries from ⌊i·size/cells⌋ up to ⌈(i+1)·size/cells⌉."""
    matrix = torch.zeros(cells, size)
    for i in range(cells):
        start, stop = i * size // cells, math.ceil((i + 1) * size / cells)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix.to(like)
