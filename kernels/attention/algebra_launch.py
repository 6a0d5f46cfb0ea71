"""The fused algebra's launches and buffers: three forward, four backward, of PyTorch nothing but `torch.empty`."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.algebra import Weights
from kernels.attention.algebra_backward import CROSS_BOUND, attend_gradient_kernel, output_gradient_kernel
from kernels.attention.algebra_forward import attend_kernel, fold_kernel, project_kernel
from kernels.attention.algebra_gradients import input_gradient_kernel, weight_gradient_kernel
from kernels.attention.algebra_state import state_size
from kernels.attention.configs import SUM_BLOCK, algebra_config, most_registers
from kernels.runtime import accumulator, device_guard

# Samples are summed inside a program, at most so many groups of them side by side: bounds the weights' partial sums.
GROUPS = 8


class Moments(NamedTuple):
    """Where a sample's Grams lie: `matrix` [B, ·] and, in elements, its rows' strides and the moments' offsets."""

    matrix: Tensor
    s_batch: int
    s_zz: int
    s_zp: int
    s_pp: int
    o_zp: int
    o_pp: int
    o_zs: int
    o_ps: int


class Coefficients(NamedTuple):
    """What the pixel passes read, in x's dtype: gain, shift [B, C, D]; after a backward also cross = d_zp [B, C, D],
    hzz = 2 d_zz [B, C, C], hpp = 2 d_pp [B, D, D] and, in the accumulator's dtype, dzs [B, C] and dps [B, D].

    fp16 alone has too little range for gradients of Grams, which shrink with the number of pixels: there each matrix
    is divided by a power of two a sample, units [5, B] in the order above, and the passes multiply by it.
    """

    gain: Tensor
    shift: Tensor
    units: Tensor
    cross: Tensor | None = None
    hzz: Tensor | None = None
    hpp: Tensor | None = None
    dzs: Tensor | None = None
    dps: Tensor | None = None


def flat_moments(state: Tensor, channels: int, prior_channels: int) -> Moments:
    """The Grams at the head of the state rows, as `algebra.split_grams` reads them."""
    C, D = channels, prior_channels
    ends = C * C, C * C + C * D, C * C + C * D + D * D
    return Moments(state, state.stride(0), C, D, D, *ends, ends[2] + C)


def square_moments(square: Tensor, channels: int, prior_channels: int) -> Moments:
    """The Grams inside [B, R, R] = u uᵀ of the stacked rows u = [z; p; 1; …]."""
    C, D, R = channels, prior_channels, square.shape[1]
    return Moments(square, R * R, R, R, R, C, C * R + C, (C + D) * R, (C + D) * R + C)


def new_state(x: Tensor, prior_channels: int) -> Tensor:
    """Uninitialised state rows [B, state_size] for x [B, C, N]."""
    size = state_size(x.shape[1], prior_channels)
    return torch.empty((x.shape[0], size), dtype=accumulator(x.dtype), device=x.device)


def _sizes(x: Tensor, p: Tensor, w: Weights) -> tuple[dict, dict]:
    """Tile sizes of all kernels, and the constants of those that write coefficients."""
    config = algebra_config(x.shape[1], p.shape[1], x.shape[1] // w.temperature.numel())
    return config, {"ACC": tl.float64 if x.dtype == torch.float64 else tl.float32}


def fused_modulation(x: Tensor, p: Tensor, moments: Moments, state: Tensor, weights: Weights) -> Coefficients:
    """`algebra.modulation` of every sample of x [B, C, N] and p [B, D, N]; fills the state for the backward pass.

    The weights are contiguous and in the accumulator's dtype; the Grams lie in the state or are copied there.
    """
    (B, C, N), D, S, w = x.shape, p.shape[1], state.shape[1], weights
    config, common = _sizes(x, p, w)
    block_m, block_n, block_k, block_h, warps = config
    tiles = triton.cdiv(C, block_n) + triton.cdiv(D, block_n)
    squares = torch.empty((B, tiles, C), dtype=state.dtype, device=x.device)
    gain = torch.empty((B, C, D), dtype=x.dtype, device=x.device)
    shift = torch.empty_like(gain)
    units = torch.empty((2, B), dtype=state.dtype, device=x.device)
    row_tiles, head_width = triton.cdiv(C, block_m), C // w.temperature.numel()
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, **common}
    with device_guard(x):
        project_kernel[(B * row_tiles, tiles + triton.cdiv(D, block_n))](
            moments.matrix, state, squares, w.norm_weight, w.norm_bias, w.query, w.key, w.value, w.out, w.scale,
            C, D, float(N), S, *moments[1:], PACK=moments.matrix is not state, **blocks,
        )  # fmt: skip
        attend_kernel[(B * triton.cdiv(head_width, block_h) * (C // head_width), triton.cdiv(D, block_n))](
            state, squares, w.key, w.value, w.temperature, C, D, head_width, float(N), S,
            BLOCK_H=block_h, BLOCK_N=block_n, BLOCK_K=block_k, TILE_N=block_n, num_warps=warps, **common,
        )  # fmt: skip
        fold_kernel[(B * row_tiles, triton.cdiv(D, block_n))](
            state, w.norm_weight, w.norm_bias, w.out, w.scale, gain, shift, units, B, C, D, S,
            SCALED=x.dtype == torch.float16, **blocks,
        )  # fmt: skip
    return Coefficients(gain, shift, units)


def fused_modulation_backward(
    x: Tensor, p: Tensor, state: Tensor, weights: Weights, d_modulation: Tensor
) -> tuple[Coefficients, Weights]:
    """`algebra.modulation_backward`: all coefficients of the gradient passes, and the weights' gradients.

    d_modulation [B, 2, C, D]: gradients of gain and shift, summed over the pixels.
    """
    (B, C, N), D, S, w = x.shape, p.shape[1], state.shape[1], weights
    acc, device = state.dtype, x.device
    (block_m, block_n, block_k, block_h, warps), common = _sizes(x, p, w)
    tiles_c, tiles_d, row_tiles = triton.cdiv(C, block_n), triton.cdiv(D, block_n), triton.cdiv(C, block_m)
    heads, groups = w.temperature.numel(), min(B, GROUPS)
    head_width, layers = C // heads, groups * tiles_c + B * (tiles_c + tiles_d)

    def scratch(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    gain, shift, cross = (scratch(B, C, D, dtype=x.dtype) for _ in range(3))
    hzz, hpp = scratch(B, C, C, dtype=x.dtype), scratch(B, D, D, dtype=x.dtype)
    dzs, dps, units = scratch(B, C), scratch(B, D), scratch(5, B)
    d_attended, d_cross, by_key, by_value = (scratch(B, C, D) for _ in range(4))
    delta, flow = scratch(B, tiles_d, C), scratch(B, CROSS_BOUND.value + tiles_d, C)
    parts, channels = scratch(groups, 3 * C * C + 2 * C * D), scratch(layers, 3, C)
    d_weights = Weights(*(torch.empty_like(weight) for weight in w))
    s_flow = flow.stride(0)
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, **common}
    scaled = {"SCALED": x.dtype == torch.float16}
    with device_guard(x):
        output_gradient_kernel[(groups * row_tiles * tiles_c + 2 * B * row_tiles * tiles_d,)](
            d_modulation, state, w.norm_weight, w.norm_bias, w.out, w.scale, d_attended, delta, gain, shift, units,
            parts, channels, B, groups, C, D, S, **blocks, **scaled, **most_registers(),
        )  # fmt: skip
        attend_gradient_kernel[(B * heads * triton.cdiv(head_width, block_h), tiles_d, 2)](
            state, w.key, w.value, w.temperature, d_attended, delta, flow, d_cross, by_key, by_value,
            C, D, head_width, S,
            BLOCK_H=block_h, BLOCK_N=block_n, BLOCK_K=block_k, TILE_N=block_n, num_warps=warps, **common,
        )  # fmt: skip
        of_maps = (groups + B) * row_tiles * (tiles_c + tiles_d)
        input_gradient_kernel[(of_maps + B * triton.cdiv(D, block_m) * tiles_d,)](
            state, flow, w.norm_weight, w.norm_bias, w.query, w.key, d_cross, by_key, by_value, cross, hzz, hpp,
            dzs, dps, units, parts, channels, B, groups, C, D, float(N), S, s_flow, **blocks, **scaled,
            **most_registers(),
        )  # fmt: skip
        grid = triton.cdiv(parts.shape[1], SUM_BLOCK) + triton.cdiv(3 * C, SUM_BLOCK) + heads
        weight_gradient_kernel[(grid,)](
            parts, channels, flow, d_weights.norm_weight, d_weights.norm_bias, d_weights.query, d_weights.key,
            d_weights.value, d_weights.temperature, d_weights.out, d_weights.scale,
            B, groups, layers, C, D, head_width, s_flow, BLOCK=SUM_BLOCK, ROWS=8, num_warps=4, **common,
        )  # fmt: skip
    return Coefficients(gain, shift, units, cross, hzz, hpp, dzs, dps), d_weights
