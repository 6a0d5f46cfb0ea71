"""Level aggregation in Triton: the levels stay at their own resolution; nothing upsampled is ever in memory.

Names: b_ block values, o_ offsets, m_ masks; levels come as tuples of pointers. A program owns one group of channels
(the softmax over levels is one number a pixel and level) along a part of one row. Three launches: one forward, two
backward, whatever the number of levels. The backward pass gathers: no atomics, results repeat bitwise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation.plan import plan_gradient, plan_target
from kernels.aggregation.sampling import (
    ALIGN,
    COPY,
    deal,
    first_reached,
    inside,
    sample_row,
    sample_tile,
    weight_of,
    widen,
)
from kernels.runtime import accumulator, device_guard


@triton.jit
def place(pid, G, parts, height, length):
    """(sample, group, row, first pixel, number of sample and group) of a program; neighbours share the pixels."""
    pid_g, rest = pid % G, pid // G
    x_first = (rest % parts).to(tl.int32) * length
    rest = rest // parts
    o_y, pid_b = (rest % height).to(tl.int32), (rest // height).to(tl.int64)
    return pid_b, pid_g, o_y, x_first, pid_b * G + pid_g


@triton.jit
def aggregate_kernel(
    values, logits, heights, widths, scales_y, scales_x, value_strides, logit_strides,
    out, lse, G, HEIGHT, WIDTH, sob, soc, soy, sox,
    WINDOWS: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """P of one group of GROUP channels along BLOCK_N targets of a row. Grid: (B·H·parts of a row·G, tiles of GROUP)."""
    parts = tl.cdiv(WIDTH, BLOCK_N)
    pid_b, pid_g, o_y, x_first, pid_bg = place(tl.program_id(0), G, parts, HEIGHT, BLOCK_N)
    o_x = x_first + tl.arange(0, BLOCK_N)
    m_x = o_x < WIDTH
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < GROUP
    o_c = pid_g * GROUP + o_d
    b_top, b_sum = tl.full((BLOCK_N,), float("-inf"), ACC), tl.zeros((BLOCK_N,), ACC)
    shares = ()
    for level in tl.static_range(LEVELS):
        sb, sc, sy, sx = logit_strides[level]
        b_logit = sample_row(
            logits[level] + pid_b * sb + widen(pid_g, WIDE) * sc, sy, sx, o_y, x_first, o_x, m_x, heights[level],
            widths[level], scales_y[level], scales_x[level], WINDOWS[level], ACC, WIDE,
        )  # fmt: skip
        b_top = tl.maximum(b_top, b_logit, propagate_nan=tl.PropagateNan.ALL)
        shares = shares + (b_logit,)  # noqa: RUF005 (Triton knows no unpacking here)
    for level in tl.static_range(LEVELS):
        b_sum += tl.exp(shares[level] - b_top)
    b_inverse = tl.fdiv(tl.full((BLOCK_N,), 1.0, ACC), b_sum, ieee_rounding=True)
    b_out = tl.zeros((BLOCK_D, BLOCK_N), ACC)
    for level in tl.static_range(LEVELS):
        sb, sc, sy, sx = value_strides[level]
        b_value = sample_tile(
            values[level] + pid_b * sb, o_c, m_d, sc, sy, sx, o_y, x_first, o_x, m_x, heights[level], widths[level],
            scales_y[level], scales_x[level], WINDOWS[level], ACC, WIDE,
        )  # fmt: skip
        b_out += (tl.exp(shares[level] - b_top) * b_inverse)[None, :] * b_value
    o_out = (widen(o_c, WIDE) * soc)[:, None] + (widen(o_y, WIDE) * soy + widen(o_x, WIDE) * sox)[None, :]
    tl.store(out + pid_b * sob + o_out, b_out.to(out.dtype.element_ty), mask=m_d[:, None] & m_x[None, :])
    if tl.program_id(1) == 0:
        o_row = (pid_bg * HEIGHT + o_y) * WIDTH + o_x
        tl.store(lse + o_row, b_top + tl.log(b_sum), mask=m_x)


@triton.jit
def share_kernel(
    dp, values, logits, heights, widths, scales_y, scales_x, value_strides, logit_strides,
    lse, share, slope, BG, G, HEIGHT, WIDTH, spb, spc, spy, spx,
    WINDOWS: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Per target and group: shares w_l, ∂L/∂ã_l = w_l (u_l − Σ w u), u_l = Σ_c dP_c Ṽ_l,c. Grid: (B·H·parts·G,)."""
    parts = tl.cdiv(WIDTH, BLOCK_N)
    pid_b, pid_g, o_y, x_first, pid_bg = place(tl.program_id(0), G, parts, HEIGHT, BLOCK_N)
    o_x = x_first + tl.arange(0, BLOCK_N)
    m_x = o_x < WIDTH
    o_row = (pid_bg * HEIGHT + o_y) * WIDTH + o_x
    size = tl.full((), BG, tl.int64) * HEIGHT * WIDTH  # of one level's shares
    b_lse = tl.load(lse + o_row, mask=m_x, other=0.0)
    b_mean = tl.zeros((BLOCK_N,), ACC)
    shares, grads = (), ()
    for level in tl.static_range(LEVELS):
        h, w, scale_y, scale_x = heights[level], widths[level], scales_y[level], scales_x[level]
        sb, sc, sy, sx = logit_strides[level]
        b_logit = sample_row(
            logits[level] + pid_b * sb + widen(pid_g, WIDE) * sc, sy, sx, o_y, x_first, o_x, m_x, h, w,
            scale_y, scale_x, WINDOWS[level], ACC, WIDE,
        )  # fmt: skip
        b_share = tl.exp(b_logit - b_lse)
        sb, sc, sy, sx = value_strides[level]
        b_grad = tl.zeros((BLOCK_N,), ACC)
        for d in range(0, GROUP, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            m_d, o_c = o_d < GROUP, pid_g * GROUP + o_d
            o_p = (widen(o_c, WIDE) * spc)[:, None] + (widen(o_y, WIDE) * spy + widen(o_x, WIDE) * spx)[None, :]
            b_dp = tl.load(dp + pid_b * spb + o_p, mask=m_d[:, None] & m_x[None, :], other=0.0).to(ACC)
            b_value = sample_tile(
                values[level] + pid_b * sb, o_c, m_d, sc, sy, sx, o_y, x_first, o_x, m_x, h, w, scale_y, scale_x,
                WINDOWS[level], ACC, WIDE,
            )  # fmt: skip
            b_grad += tl.sum(b_value * b_dp, 0)
        b_mean += b_share * b_grad
        shares, grads = shares + (b_share,), grads + (b_grad,)  # noqa: RUF005 (Triton knows no unpacking here)
    for level in tl.static_range(LEVELS):
        tl.store(share + level * size + o_row, shares[level], mask=m_x)
        tl.store(slope + level * size + o_row, shares[level] * (grads[level] - b_mean), mask=m_x)


@triton.jit
def gather_rows(
    dp, share, slope, o_c, m_d, o_y, o_m, m_m, first, last, h, w, scale_y, scale_x, inverse_y, inverse_x,
    reach_y, reach_x, HEIGHT, WIDTH, spc, spy, spx,
    BLOCK_T: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients [channels, sources o_m] and [sources] of a part of row o_y of one level.

    Every target row that sampled this row is read once, in whole rows, and summed by its weights along y; then each
    source takes its targets out of the sum, by their weights along x and in their order.
    """
    b_value = tl.zeros((o_c.shape[0], o_m.shape[0]), ACC)
    b_logit = tl.zeros((o_m.shape[0],), ACC)
    y_first, b_first = first_reached(o_y, inverse_y, ACC), first_reached(o_m, inverse_x, ACC)
    start = first_reached(first, inverse_x, ACC) // ALIGN * ALIGN
    stop = tl.minimum(first_reached(last, inverse_x, ACC) + reach_x, WIDTH)
    for x_first in range(start, stop, BLOCK_T):
        o_x = x_first + tl.arange(0, BLOCK_T)
        b_sum = tl.zeros((o_c.shape[0], BLOCK_T), ACC)
        b_slopes = tl.zeros((BLOCK_T,), ACC)
        for row in range(reach_y):
            t_y = y_first + row
            b_y = weight_of(o_y, t_y, scale_y, h, ACC)
            # A target of weight zero is not read: it may hold NaN.
            m_t = o_x < tl.where((t_y < HEIGHT) & (b_y > 0.0), WIDTH, 0)
            o_t = t_y * WIDTH + o_x
            b_share = b_y * tl.load(share + o_t, mask=m_t, other=0.0)
            b_slopes += b_y * tl.load(slope + o_t, mask=m_t, other=0.0)
            o_p = (widen(o_c, WIDE) * spc)[:, None] + (widen(t_y, WIDE) * spy + widen(o_x, WIDE) * spx)[None, :]
            b_sum += b_share[None, :] * tl.load(dp + o_p, mask=m_d[:, None] & m_t[None, :], other=0.0).to(ACC)
        for column in range(reach_x):
            t_x = b_first + column
            b_x = weight_of(o_m, t_x, scale_x, w, ACC)
            here = m_m & (b_x > 0.0) & (t_x >= x_first) & (t_x < tl.minimum(x_first + BLOCK_T, WIDTH))
            index = inside(t_x - x_first, BLOCK_T)
            b_value += tl.where(here[None, :], b_x[None, :] * deal(b_sum, index), 0.0)
            b_logit += tl.where(here, b_x * tl.gather(b_slopes, index, 0), 0.0)
    return b_value, b_logit


@triton.jit
def level_gradient_kernel(
    dp, share, slope, d_values, d_logits, heights, widths, scales_y, scales_x, inverses_y, inverses_x,
    reaches_y, reaches_x, lengths, firsts, stops, value_strides, logit_strides,
    BG, G, HEIGHT, WIDTH, spb, spc, spy, spx,
    BLOCKS_M: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of all levels: every source pixel gathers the targets that sampled it.

    Programs firsts[l] to stops[l] own level l. Grid: (Σ_l B·h_l·parts of a row·G, tiles of the group).
    """
    pid = tl.program_id(0)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < GROUP
    size = tl.full((), BG, tl.int64) * HEIGHT * WIDTH
    for level in tl.static_range(LEVELS):
        if (pid >= firsts[level]) & (pid < stops[level]):
            h, w, length = heights[level], widths[level], lengths[level]
            parts = tl.cdiv(w, length)
            pid_b, pid_g, o_y, x_first, pid_bg = place(pid - firsts[level], G, parts, h, length)
            o_c = pid_g * GROUP + o_d
            o_plane = level * size + pid_bg * HEIGHT * WIDTH
            b_dp = dp + pid_b * spb
            if BLOCKS_M[level] == COPY:
                o_m = x_first + tl.arange(0, BLOCK_T)
                m_m = o_m < w
                o_t = o_y * WIDTH + o_m
                b_share = tl.load(share + o_plane + o_t, mask=m_m, other=0.0)
                o_p = (widen(o_c, WIDE) * spc)[:, None] + (widen(o_y, WIDE) * spy + widen(o_m, WIDE) * spx)[None, :]
                b_value = b_share[None, :] * tl.load(b_dp + o_p, mask=m_d[:, None] & m_m[None, :], other=0.0).to(ACC)
                b_logit = tl.load(slope + o_plane + o_t, mask=m_m, other=0.0)
            else:
                o_m = x_first + tl.arange(0, BLOCKS_M[level])
                last = tl.minimum(x_first + length, w) - 1
                m_m = o_m <= last
                b_value, b_logit = gather_rows(
                    b_dp, share + o_plane, slope + o_plane, o_c, m_d, o_y, o_m, m_m, x_first, last, h, w,
                    scales_y[level], scales_x[level], inverses_y[level], inverses_x[level],
                    reaches_y[level], reaches_x[level], HEIGHT, WIDTH, spc, spy, spx, BLOCK_T, ACC, WIDE,
                )  # fmt: skip
            sb, sc, sy, sx = value_strides[level]
            o_v = (widen(o_c, WIDE) * sc)[:, None] + (widen(o_y, WIDE) * sy + widen(o_m, WIDE) * sx)[None, :]
            d_value = d_values[level] + pid_b * sb
            tl.store(d_value + o_v, b_value.to(d_value.dtype.element_ty), mask=m_d[:, None] & m_m[None, :])
            if tl.program_id(1) == 0:
                sb, sc, sy, sx = logit_strides[level]
                d_logit = d_logits[level] + pid_b * sb + widen(pid_g, WIDE) * sc
                o_a = widen(o_y, WIDE) * sy + widen(o_m, WIDE) * sx
                tl.store(d_logit + o_a, b_logit.to(d_logit.dtype.element_ty), mask=m_m)


def _types(dtype: torch.dtype) -> dict:
    return {"ACC": tl.float64 if dtype == torch.float64 else tl.float32}


def forward_pass(values, logits, out: Tensor) -> Tensor:
    """Writes P into out [B, D, H, W] and returns the log-sum-exp of the resampled logits [B, G, H, W]."""
    B, _, H, W = out.shape
    G = logits[0].shape[1]
    lse = torch.empty((B, G, H, W), dtype=accumulator(out.dtype), device=out.device)
    plan = plan_target(values, logits, out)
    with device_guard(out):
        aggregate_kernel[plan.grid](
            *plan.levels, out, lse, G, H, W, *out.stride(), **plan.constants, **_types(out.dtype)
        )
    return lse


def backward_pass(dp: Tensor, values, logits, lse: Tensor, d_values, d_logits) -> None:
    """Writes the gradients of every level into d_values and d_logits."""
    B, _, H, W = dp.shape
    G, L = logits[0].shape[1], len(values)
    share = torch.empty((L, B, G, H, W), dtype=lse.dtype, device=dp.device)
    slope = torch.empty_like(share)
    plan = plan_target(values, logits, dp)
    gradient = plan_gradient(d_values, d_logits, dp)
    target = (B * G, G, H, W, *dp.stride())
    with device_guard(dp):
        share_kernel[plan.grid[:1]](dp, *plan.levels, lse, share, slope, *target, **plan.constants, **_types(dp.dtype))
        level_gradient_kernel[gradient.grid](
            dp, share, slope, *gradient.levels, *target, **gradient.constants, **_types(dp.dtype)
        )
