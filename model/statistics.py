"""Per-channel statistics of level features: what "standardised" means, everywhere it is said."""

from collections.abc import Sequence

import torch
from torch import nn

EPS = 1e-6


class FeatureStatistics(nn.Module):
    """Mean and standard deviation of every channel of every level, measured once, then fixed.

    `update` accumulates over batches in fp64 on the features' device (the same batches give the same numbers, however
    often and wherever they are measured on one kind of device); `freeze` writes the fp32 buffers, which travel in the
    state dict. `n(x)` = (x − mean) / std. Before `freeze` the buffers are 0 and 1, which standardises nothing:
    `calibrated` says which it is, also after loading.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        for level, count in enumerate(self.channels):
            self.register_buffer(f"mean_{level}", torch.zeros(count))
            self.register_buffer(f"std_{level}", torch.ones(count))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self._sums: list[tuple[int, torch.Tensor, torch.Tensor]] | None = None

    @property
    def calibrated(self) -> bool:
        return bool(self.frozen)

    def moments(self, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and std of a level (0-based), each [c_l, 1, 1], fp32."""
        return getattr(self, f"mean_{level}").view(-1, 1, 1), getattr(self, f"std_{level}").view(-1, 1, 1)

    def normalise(self, feature: torch.Tensor, level: int) -> torch.Tensor:
        """Return n(feature) of a level (0-based), [B, c_l, h, w], in the feature's dtype."""
        mean, std = self.moments(level)
        return (feature - mean.to(feature.dtype)) / std.to(feature.dtype)

    @torch.no_grad()
    def update(self, features: Sequence[torch.Tensor]) -> None:
        """Add one batch of level features, each [B, c_l, h, w], to the measurement."""
        shapes = [f.shape[1] if f.ndim == 4 else None for f in features]
        if shapes != list(self.channels):
            raise ValueError(f"statistics of levels with {list(self.channels)} channels were given features {shapes}")
        if self._sums is None:
            self._sums = [(0, 0.0, 0.0)] * len(self.channels)
        for level, feature in enumerate(features):
            count, total, squares = self._sums[level]
            wide = feature.detach().double()
            # Sums about the first batch's mean would cancel less, but features here are within a few std of zero.
            self._sums[level] = (
                count + wide.numel() // wide.shape[1],
                total + wide.sum((0, 2, 3)),
                squares + wide.square().sum((0, 2, 3)),
            )

    @torch.no_grad()
    def freeze(self) -> None:
        """Turn what was measured into the fixed mean and std; ValueError if nothing was, or a non-finite value."""
        if self._sums is None:
            raise ValueError("feature statistics have seen no features: call update with at least one batch first")
        moments = []
        for level, (count, total, squares) in enumerate(self._sums):
            mean = total / count
            variance = (squares / count - mean.square()).clamp_min(0)
            if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
                raise ValueError(f"level {level + 1} of the features is not finite: check the images and the weights")
            # A channel that (almost) never moves must not be blown up: its scale is at least 1 % of the level's.
            floor = 0.01 * variance.mean().sqrt() + EPS
            moments.append((mean, variance.sqrt().clamp_min(floor)))
        for level, (mean, std) in enumerate(moments):
            getattr(self, f"mean_{level}").copy_(mean)
            getattr(self, f"std_{level}").copy_(std)
        self.frozen.fill_(True)
        self._sums = None

    def copy_from(self, other: "FeatureStatistics") -> None:
        """Take over the numbers of other statistics of the same levels."""
        if other.channels != self.channels:
            raise ValueError(f"statistics of channels {list(other.channels)} do not fit {list(self.channels)}")
        with torch.no_grad():
            for mine, theirs in zip(self.buffers(), other.buffers(), strict=True):
                mine.copy_(theirs)
