"""Level aggregation in Triton: the levels stay at their own resolution; nothing upsampled is ever in memory.

Names: b_ block values, o_ offsets, m_ masks; levels come as tuples of pointers. A program owns one group of channels:
the softmax over levels is one number a pixel and level. The backward pass gathers: no atomics, results repeat bitwise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.runtime import INTERPRETING, accumulator, device_guard, needs_int64, pixel_strides

# (BLOCK_D, BLOCK_N) elements of one program's tile: eight an element of a thread.
WARPS = 4


@triton.jit
def real(value, ACC: tl.constexpr):
    """An integer argument as a floating number; Triton turns an argument of 1 into a constant, which has no `.to`."""
    return tl.full((), value, ACC)


@triton.jit
def source(o, scale, size, ACC: tl.constexpr):
    """F.interpolate(align_corners=False): lower index, upper index and the upper's weight of target positions o."""
    position = tl.maximum((o.to(ACC) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(position.to(tl.int32), size - 1)
    high = tl.minimum(low + 1, size - 1)
    return low, high, position - low.to(ACC)


@triton.jit
def taps(o_y, o_x, h, w, HEIGHT, WIDTH, stride_y, stride_x, ACC: tl.constexpr, WIDE: tl.constexpr):
    """Element offsets and weights of the four source pixels of every target pixel."""
    y0, y1, fy = source(o_y, real(h, ACC) / HEIGHT, h, ACC)
    x0, x1, fx = source(o_x, real(w, ACC) / WIDTH, w, ACC)
    if WIDE:
        y0, y1, x0, x1 = y0.to(tl.int64), y1.to(tl.int64), x0.to(tl.int64), x1.to(tl.int64)
    y0, y1, x0, x1 = y0 * stride_y, y1 * stride_y, x0 * stride_x, x1 * stride_x
    low, high = 1.0 - fy, fy
    return (y0 + x0, y0 + x1, y1 + x0, y1 + x1), (low * (1.0 - fx), low * fx, high * (1.0 - fx), high * fx)


@triton.jit
def sample_row(ptr, offsets, weights, mask, ACC: tl.constexpr):
    """Bilinear sample of one channel at the target pixels."""
    total = weights[0] * tl.load(ptr + offsets[0], mask=mask, other=0.0).to(ACC)
    total += weights[1] * tl.load(ptr + offsets[1], mask=mask, other=0.0).to(ACC)
    total += weights[2] * tl.load(ptr + offsets[2], mask=mask, other=0.0).to(ACC)
    total += weights[3] * tl.load(ptr + offsets[3], mask=mask, other=0.0).to(ACC)
    return total


@triton.jit
def sample_tile(ptr, o_channel, offsets, weights, mask, ACC: tl.constexpr):
    """Bilinear samples [channels, pixels]; o_channel: element offsets of the channels."""
    rows = ptr + o_channel[:, None]
    total = weights[0][None, :] * tl.load(rows + offsets[0][None, :], mask=mask, other=0.0).to(ACC)
    total += weights[1][None, :] * tl.load(rows + offsets[1][None, :], mask=mask, other=0.0).to(ACC)
    total += weights[2][None, :] * tl.load(rows + offsets[2][None, :], mask=mask, other=0.0).to(ACC)
    total += weights[3][None, :] * tl.load(rows + offsets[3][None, :], mask=mask, other=0.0).to(ACC)
    return total


@triton.jit
def widen(o, WIDE: tl.constexpr):
    if WIDE:
        o = o.to(tl.int64)
    return o


@triton.jit
def aggregate_kernel(
    values, logits, heights, widths, value_strides, logit_strides, out, lse, G, HEIGHT, WIDTH, sob, soc, son,
    LEVELS: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """P of one group of GROUP channels at a block of target pixels. Grid: (B·G·pixel blocks, tiles of the group)."""
    N = HEIGHT * WIDTH
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    pid_bg = pid // blocks
    pid_b, pid_g = pid_bg // G, pid_bg % G
    o_n = (pid % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n = o_n < N
    mask = (o_d < GROUP)[:, None] & m_n[None, :]
    o_y, o_x = o_n // WIDTH, o_n % WIDTH
    o_c = pid_g * GROUP + o_d
    # Online softmax over the levels: highest logit so far, sum of exponentials, weighted sum of values.
    b_top = tl.full((BLOCK_N,), float("-inf"), ACC)
    b_sum = tl.zeros((BLOCK_N,), ACC)
    b_out = tl.zeros((BLOCK_D, BLOCK_N), ACC)
    for level in tl.static_range(LEVELS):
        h, w = heights[level], widths[level]
        sb, sc, sy, sx = logit_strides[level]
        o_tap, b_tap = taps(o_y, o_x, h, w, HEIGHT, WIDTH, sy, sx, ACC, WIDE)
        b_logit = sample_row(logits[level] + pid_b * sb + pid_g * sc, o_tap, b_tap, m_n, ACC)
        sb, sc, sy, sx = value_strides[level]
        o_tap, b_tap = taps(o_y, o_x, h, w, HEIGHT, WIDTH, sy, sx, ACC, WIDE)
        b_value = sample_tile(values[level] + pid_b * sb, o_c * sc, o_tap, b_tap, mask, ACC)
        b_new = tl.maximum(b_top, b_logit, propagate_nan=tl.PropagateNan.ALL)
        b_fade, b_share = tl.exp(b_top - b_new), tl.exp(b_logit - b_new)
        b_out = b_out * b_fade[None, :] + b_value * b_share[None, :]
        b_sum = b_sum * b_fade + b_share
        b_top = b_new
    b_out = (b_out / b_sum[None, :]).to(out.dtype.element_ty)
    o_out = widen(o_c, WIDE)[:, None] * soc + widen(o_n, WIDE)[None, :] * son
    tl.store(out + pid_b * sob + o_out, b_out, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(lse + pid_bg * N + o_n, b_top + tl.log(b_sum), mask=m_n)


@triton.jit
def share_kernel(
    dp, values, logits, heights, widths, value_strides, logit_strides, lse, share, d_share, mean, BG, G,
    HEIGHT, WIDTH, spb, spc, spn,
    LEVELS: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Per target pixel and group: w_l, ∂L/∂w_l = Σ_c dP Ṽ_l, and Σ_l w_l ∂L/∂w_l. Grid: (B·G·pixel blocks,)."""
    N = HEIGHT * WIDTH
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    pid_bg = pid // blocks
    pid_b, pid_g = pid_bg // G, pid_bg % G
    o_n = (pid % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_y, o_x = o_n // WIDTH, o_n % WIDTH
    o_row = pid_bg * N + o_n
    level_size = tl.full((), BG, tl.int64) * N
    b_lse = tl.load(lse + o_row, mask=m_n, other=0.0)
    b_mean = tl.zeros((BLOCK_N,), ACC)
    for level in tl.static_range(LEVELS):
        h, w = heights[level], widths[level]
        sb, sc, sy, sx = logit_strides[level]
        o_tap, b_tap = taps(o_y, o_x, h, w, HEIGHT, WIDTH, sy, sx, ACC, WIDE)
        b_share = tl.exp(sample_row(logits[level] + pid_b * sb + pid_g * sc, o_tap, b_tap, m_n, ACC) - b_lse)
        sb, sc, sy, sx = value_strides[level]
        o_tap, b_tap = taps(o_y, o_x, h, w, HEIGHT, WIDTH, sy, sx, ACC, WIDE)
        b_grad = tl.zeros((BLOCK_N,), ACC)
        for d in range(0, GROUP, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            mask = (o_d < GROUP)[:, None] & m_n[None, :]
            o_c = pid_g * GROUP + o_d
            o_p = widen(o_c, WIDE)[:, None] * spc + widen(o_n, WIDE)[None, :] * spn
            b_dp = tl.load(dp + pid_b * spb + o_p, mask=mask, other=0.0).to(ACC)
            b_grad += tl.sum(sample_tile(values[level] + pid_b * sb, o_c * sc, o_tap, b_tap, mask, ACC) * b_dp, 0)
        b_mean += b_share * b_grad
        tl.store(share + level * level_size + o_row, b_share, mask=m_n)
        tl.store(d_share + level * level_size + o_row, b_grad, mask=m_n)
    tl.store(mean + o_row, b_mean, mask=m_n)


@triton.jit
def first_reached(o, scale):
    """First target that may sample source position o; the first source pixel also serves all targets before it."""
    first = tl.floor((o - 0.5) / scale - 0.5).to(tl.int32)
    return tl.where(o == 0, 0, tl.maximum(first, 0))


@triton.jit
def weight_of(o, o_target, scale, size):
    """Weight with which target o_target samples source o along one axis: the hat function of the clamped position."""
    position = tl.minimum(tl.maximum((o_target + 0.5) * scale - 0.5, 0.0), size - 1.0)
    return tl.maximum(1.0 - tl.abs(position - o), 0.0)


@triton.jit
def level_gradient_kernel(
    dp, share, d_share, mean, d_value, d_logit, G, h, w, HEIGHT, WIDTH, rows, columns,
    spb, spc, spn, svb, svc, svn, sab, sac, san,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of one level: every source pixel gathers the targets that sampled it, at most rows × columns of them.

    Grid: (B·G·source blocks, tiles of the group).
    """
    N, n = HEIGHT * WIDTH, h * w
    blocks = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    pid_bg = pid // blocks
    pid_b, pid_g = pid_bg // G, pid_bg % G
    o_m = (pid % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < n
    o_y, o_x = o_m // w, o_m % w
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < GROUP
    o_c = pid_g * GROUP + o_d
    share += pid_bg * N
    d_share += pid_bg * N
    mean += pid_bg * N
    dp += pid_b * spb
    size_y, size_x = real(h, ACC), real(w, ACC)
    scale_y, scale_x = size_y / HEIGHT, size_x / WIDTH
    y, x = o_y.to(ACC), o_x.to(ACC)
    first_y, first_x = first_reached(y, scale_y), first_reached(x, scale_x)
    b_value = tl.zeros((BLOCK_D, BLOCK_N), ACC)
    b_logit = tl.zeros((BLOCK_N,), ACC)
    for row in range(rows):
        t_y = first_y + row
        b_wy = tl.where(m_m & (t_y < HEIGHT), weight_of(y, t_y.to(ACC), scale_y, size_y), 0.0)
        for column in range(columns):
            t_x = first_x + column
            b_w = b_wy * weight_of(x, t_x.to(ACC), scale_x, size_x)
            m_t = (b_w > 0.0) & (t_x < WIDTH)  # a target of weight zero may hold NaN
            o_t = t_y * WIDTH + t_x
            b_share = tl.load(share + o_t, mask=m_t, other=0.0) * b_w
            b_slope = tl.load(d_share + o_t, mask=m_t, other=0.0) - tl.load(mean + o_t, mask=m_t, other=0.0)
            b_logit += b_share * b_slope
            o_p = widen(o_c, WIDE)[:, None] * spc + widen(o_t, WIDE)[None, :] * spn
            b_dp = tl.load(dp + o_p, mask=m_d[:, None] & m_t[None, :], other=0.0).to(ACC)
            b_value += b_dp * b_share[None, :]
    o_v = widen(o_c, WIDE)[:, None] * svc + widen(o_m, WIDE)[None, :] * svn
    mask = m_d[:, None] & m_m[None, :]
    tl.store(d_value + pid_b * svb + o_v, b_value.to(d_value.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        o_a = widen(o_m, WIDE) * san
        tl.store(d_logit + pid_b * sab + pid_g * sac + o_a, b_logit.to(d_logit.dtype.element_ty), mask=m_m)


def _tile(group: int) -> tuple[int, int]:
    """BLOCK_D channels and BLOCK_N pixels of one program, from the group's width alone."""
    if INTERPRETING:
        return min(16, triton.next_power_of_2(group)), 64
    block_d = min(32, triton.next_power_of_2(group))
    return block_d, 1024 // block_d


def _level_strides(levels) -> tuple:
    return tuple(tuple(level.stride()) for level in levels)


def _flat_view(plane: Tensor) -> Tensor:
    B, C, H, W = plane.shape
    return plane.as_strided((B, C, H * W), pixel_strides(plane))


def _options(*maps: Tensor) -> dict:
    dtype = maps[0].dtype
    wide = needs_int64(*(_flat_view(m) for m in maps))
    return {"ACC": tl.float64 if dtype == torch.float64 else tl.float32, "WIDE": wide, "num_warps": WARPS}


def forward_pass(values, logits, out: Tensor) -> Tensor:
    """Writes P into out [B, D, H, W] and returns the log-sum-exp of the resampled logits [B, G, H, W]."""
    B, D, H, W = out.shape
    G = logits[0].shape[1]
    lse = torch.empty((B, G, H, W), dtype=accumulator(out.dtype), device=out.device)
    block_d, block_n = _tile(D // G)
    grid = (B * G * triton.cdiv(H * W, block_n), triton.cdiv(D // G, block_d))
    with device_guard(out):
        aggregate_kernel[grid](
            tuple(values), tuple(logits), tuple(v.shape[2] for v in values), tuple(v.shape[3] for v in values),
            _level_strides(values), _level_strides(logits), out, lse, G, H, W, *pixel_strides(out),
            LEVELS=len(values), GROUP=D // G, BLOCK_D=block_d, BLOCK_N=block_n, **_options(out, *values),
        )  # fmt: skip
    return lse


def backward_pass(dp: Tensor, values, logits, lse: Tensor, d_values, d_logits) -> None:
    """Writes the gradients of every level into d_values and d_logits."""
    B, D, H, W = dp.shape
    G, L = logits[0].shape[1], len(values)
    share = torch.empty((L, B, G, H * W), dtype=lse.dtype, device=dp.device)
    d_share, mean = torch.empty_like(share), torch.empty_like(share[0])
    block_d, block_n = _tile(D // G)
    tile = {"GROUP": D // G, "BLOCK_D": block_d, "BLOCK_N": block_n}
    with device_guard(dp):
        share_kernel[(B * G * triton.cdiv(H * W, block_n),)](
            dp, tuple(values), tuple(logits), tuple(v.shape[2] for v in values), tuple(v.shape[3] for v in values),
            _level_strides(values), _level_strides(logits), lse, share, d_share, mean, B * G, G, H, W,
            *pixel_strides(dp), LEVELS=L, **tile, **_options(dp, *values),
        )  # fmt: skip
        # Half the pixels a program: a coarse level has few of them, and each gathers many targets.
        block_n = max(16, block_n // 2)
        tile["BLOCK_N"] = block_n
        for level, (d_value, d_logit) in enumerate(zip(d_values, d_logits, strict=True)):
            h, w = d_value.shape[2:]
            grid = (B * G * triton.cdiv(h * w, block_n), triton.cdiv(D // G, block_d))
            level_gradient_kernel[grid](
                dp, share[level], d_share[level], mean, d_value, d_logit, G, h, w, H, W,
                _reach(H, h), _reach(W, w), *pixel_strides(dp), *pixel_strides(d_value), *pixel_strides(d_logit),
                **tile, **_options(dp, d_value),
            )  # fmt: skip


def _reach(size: int, level: int) -> int:
    """Most targets along one axis that may sample one source pixel: two source steps, and rounding at both ends."""
    return min(size, -(-2 * size // level) + 2)
