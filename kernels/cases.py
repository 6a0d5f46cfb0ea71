"""Random inputs of both operations: one source for tests, microbenchmarks and the GPU report."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.aggregation.api import aggregate_levels
from kernels.attention.algebra import Weights
from kernels.attention.api import semantic_attention

LEVEL_STRIDES = (4, 8, 16, 32)


def attention_case(
    shape: tuple[int, int, int, int],
    prior_channels: int,
    heads: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    channels_last: bool = False,
    seed: int = 0,
    drawn_on: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor, Weights]:
    """x [B, C, H, W], p [B, D, H, W] in dtype; float32 weights (float64 with float64) of a trained layer's size.

    drawn_on: where the numbers are made, which are others on a GPU, and faster there.
    """
    B, C, H, W = shape
    D = prior_channels
    rng = torch.Generator(drawn_on).manual_seed(seed)

    def normal(*size: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64, device=drawn_on) * std + mean

    # An offset and a spread per channel, as features after a convolution have them.
    x = normal(B, C, H, W) * normal(1, C, 1, 1, std=0.3, mean=1.0) + normal(1, C, 1, 1)
    p = normal(B, D, H, W) + normal(1, D, 1, 1, std=0.5)
    weights = Weights(
        norm_weight=normal(C, std=0.2, mean=1.0),
        norm_bias=normal(C, std=0.2),
        query=normal(C, C, std=C**-0.5),
        key=normal(C, D, std=D**-0.5),
        value=normal(C, D, std=D**-0.5),
        temperature=normal(heads).abs() + 1.0,
        out=normal(2 * C, C, std=C**-0.5),
        scale=normal(C, std=0.5),
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, p = (t.to(device=device, dtype=dtype).contiguous(memory_format=layout) for t in (x, p))
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return x, p, Weights(*(w.to(device=device, dtype=kept) for w in weights))


def call_attention(x: Tensor, p: Tensor, weights: Weights, **options) -> Tensor:
    """The public function with weights given as the tuple of attention_case."""
    w = weights
    return semantic_attention(
        x,
        p,
        norm_weight=w.norm_weight,
        norm_bias=w.norm_bias,
        query_weight=w.query,
        key_weight=w.key,
        value_weight=w.value,
        temperature=w.temperature,
        out_weight=w.out,
        scale=w.scale,
        heads=w.temperature.numel(),
        **options,
    )


def aggregation_case(
    batch: int,
    channels: int,
    groups: int,
    sizes: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    channels_last: bool = False,
    seed: int = 0,
    drawn_on: str | torch.device = "cpu",
) -> tuple[list[Tensor], list[Tensor]]:
    """values [B, D, h_l, w_l] and logits [B, G, h_l, w_l] for the given level sizes (h_l, w_l)."""
    rng = torch.Generator(drawn_on).manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def level(count: int, size: tuple[int, int]) -> Tensor:
        tensor = torch.randn(batch, count, *size, generator=rng, dtype=torch.float64, device=drawn_on)
        return tensor.to(device=device, dtype=dtype).contiguous(memory_format=layout)

    return [level(channels, size) for size in sizes], [level(groups, size) for size in sizes]


def call_aggregation(values: Sequence[Tensor], logits: Sequence[Tensor], size: tuple[int, int], **options) -> Tensor:
    """The public function, under the name that pairs with call_attention."""
    return aggregate_levels(values, logits, size, **options)
