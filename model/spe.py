"""Semantic prior embedding (SPE): puts the prior's levels into one feature of a deblurring network.

Shapes: B batch, C channels of the network's feature, D channels of the prior inside the embedding, L levels.
The parameters live in these modules (sharded training gathers a module's own weights); the arithmetic is in `kernels`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels import aggregate_levels, semantic_attention


class MultiLevelAggregation(nn.Module):
    """Levels r_l [B, c_l, h_l, w_l] → P [B, dim, H, W]: each pixel and channel group weighs the levels by a softmax.

    Each level is projected at its own resolution; projections commute with bilinear sampling, so this equals
    upsampling first. Output dtype: the projections' (autocast's, where it is on). ValueError on bad sizes.
    """

    def __init__(self, level_channels: Sequence[int], dim: int, groups: int):
        super().__init__()
        level_channels = list(level_channels)
        if not level_channels or min(level_channels) < 1:
            raise ValueError(f"level_channels: expected one positive count a level, got {level_channels}")
        if dim < 1 or groups < 1 or dim % groups:
            raise ValueError(f"groups: {groups} must be positive and divide dim {dim}")
        self.values = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in level_channels)
        self.logits = nn.ModuleList(nn.Conv2d(c, groups, 1) for c in level_channels)
        for logit in self.logits:  # every level begins with an equal share
            nn.init.zeros_(logit.weight)
            nn.init.zeros_(logit.bias)

    def forward(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        if len(levels) != len(self.values):
            raise ValueError(f"levels: {len(levels)} given, the embedding was built for {len(self.values)}")
        values = [project(level) for project, level in zip(self.values, levels, strict=True)]
        logits = [project(level) for project, level in zip(self.logits, levels, strict=True)]
        return aggregate_levels(values, logits, size)


class SemanticAttentionTransformation(nn.Module):
    """Feature x [B, C, H, W] and prior p [B, dim, H, W] → x + scale ⊙ (x̂ ⊙ g + b), in x's dtype; new: x itself.

    Source: see `kernels.semantic_attention`. ValueError when heads does not divide channels.
    """

    def __init__(self, channels: int, dim: int, heads: int):
        super().__init__()
        if channels < 1 or dim < 1 or heads < 1 or channels % heads:
            raise ValueError(f"heads: {heads} must be positive and divide channels {channels} (dim {dim})")
        self.heads = heads
        self.norm_weight = nn.Parameter(torch.ones(channels))
        self.norm_bias = nn.Parameter(torch.zeros(channels))
        self.query_weight = nn.Parameter(torch.empty(channels, channels))
        self.key_weight = nn.Parameter(torch.empty(channels, dim))
        self.value_weight = nn.Parameter(torch.empty(channels, dim))
        self.temperature = nn.Parameter(torch.ones(heads))
        self.out_weight = nn.Parameter(torch.empty(2 * channels, channels))
        # scale alone starts at zero: y = x, and scale's own gradient is alive because g and b are not zero.
        self.scale = nn.Parameter(torch.zeros(channels))
        for weight in (self.query_weight, self.key_weight, self.value_weight):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        # The attention of a new layer is nearly uniform: it averages d = C/h channels, which shrinks g and b by √d.
        nn.init.normal_(self.out_weight, std=heads**-0.5)

    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        return semantic_attention(
            x,
            p,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            query_weight=self.query_weight,
            key_weight=self.key_weight,
            value_weight=self.value_weight,
            temperature=self.temperature,
            out_weight=self.out_weight,
            scale=self.scale,
            heads=self.heads,
        )

    def extra_repr(self) -> str:
        channels, dim = self.key_weight.shape
        return f"channels={channels}, dim={dim}, heads={self.heads}"


class SemanticPriorEmbedding(nn.Module):
    """One point of embedding: x [B, C, H, W] and the prior's levels → x of the same shape; exact identity when new."""

    def __init__(self, level_channels: Sequence[int], channels: int, dim: int, groups: int, heads: int):
        super().__init__()
        self.aggregate = MultiLevelAggregation(level_channels, dim, groups)
        self.attend = SemanticAttentionTransformation(channels, dim, heads)

    def forward(self, x: Tensor, levels: Sequence[Tensor]) -> Tensor:
        return self.attend(x, self.aggregate(levels, x.shape[2:]))
