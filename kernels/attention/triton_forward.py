"""Semantic attention in Triton: the four passes over the pixels (README.md beside this file has the mathematics).

Names: b_ block values, o_ offsets, m_ masks; C, D channels of x and p, N pixels; every tile is [channels, pixels].
Statistics and sums are fp32 (fp64 in the interpreter's gradcheck); matrix operands keep the storage dtype. Splits over
pixels write fp32 partials that a second reduction sums in a fixed order: no atomics, so every result repeats bitwise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.algebra import gram_size
from kernels.attention.algebra_launch import Coefficients, Moments, flat_moments, new_state, square_moments
from kernels.attention.algebra_tiles import sum_splits
from kernels.attention.configs import fused, launch_config, tile_width
from kernels.runtime import (
    INTERPRETING,
    accumulator,
    device_guard,
    needs_int64,
    splits_over_pixels,
    target_architecture,
)


@triton.jit
def offsets_2d(o_row, o_col, stride_row, stride_col, WIDE: tl.constexpr):
    """Element offsets of a tile; 64-bit where the map's extent asks for it."""
    if WIDE:
        o_row, o_col = o_row.to(tl.int64), o_col.to(tl.int64)
    return o_row[:, None] * stride_row + o_col[None, :] * stride_col


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def load_matrix(ptr, o_row, o_col, ROWS, COLS):
    """Tile of a row-major matrix [ROWS, COLS], zero outside."""
    mask = (o_row < ROWS)[:, None] & (o_col < COLS)[None, :]
    return tl.load(ptr + o_row[:, None] * COLS + o_col[None, :], mask=mask, other=0.0)


@triton.jit
def load_unit(ptr, index, batch, pid_b, SCALED: tl.constexpr, ACC: tl.constexpr):
    """Power of two by which the host divided a coefficient matrix to fit fp16; 1 for wider dtypes."""
    unit = tl.full((), 1.0, ACC)
    if SCALED:
        unit = tl.load(ptr + index * batch + pid_b).to(ACC)
    return unit


@triton.jit
def gram_kernel(
    x, p, mean, rstd, partial, N, steps, eps, sxb, sxc, sxn, spb, spc, spn,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mean and 1/std of every pixel, and this split's share of Σ zzᵀ, Σ zpᵀ, Σ ppᵀ, Σ z, Σ p. Grid: (B·splits,)."""
    pid = tl.program_id(0).to(tl.int64)
    splits = tl.cdiv(N, steps * BLOCK_N)
    pid_b, pid_s = pid // splits, pid % splits
    x += pid_b * sxb
    p += pid_b * spb
    mean += pid_b * N
    rstd += pid_b * N
    o_c, o_d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    m_c, m_d = o_c < C, o_d < D
    b_zz = tl.zeros((BLOCK_C, BLOCK_C), ACC)
    b_zp = tl.zeros((BLOCK_C, BLOCK_D), ACC)
    b_pp = tl.zeros((BLOCK_D, BLOCK_D), ACC)
    b_zs = tl.zeros((BLOCK_C,), ACC)
    b_ps = tl.zeros((BLOCK_D,), ACC)
    first = pid_s.to(tl.int32) * steps * BLOCK_N
    for step in range(steps):
        o_n = first + step * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_x = tl.load(x + offsets_2d(o_c, o_n, sxc, sxn, WIDE), mask=m_c[:, None] & m_n[None, :], other=0.0).to(ACC)
        b_p = tl.load(p + offsets_2d(o_d, o_n, spc, spn, WIDE), mask=m_d[:, None] & m_n[None, :], other=0.0)
        b_mean = tl.sum(b_x, 0) / C
        b_z = tl.where(m_c[:, None], b_x - b_mean[None, :], 0.0)
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_z * b_z, 0) / C + eps)
        tl.store(mean + o_n, b_mean, mask=m_n)
        tl.store(rstd + o_n, b_rstd, mask=m_n)
        b_z = b_z * b_rstd[None, :]
        b_zs += tl.sum(b_z, 1)
        b_ps += tl.sum(b_p.to(ACC), 1)
        b_zh = b_z.to(b_p.dtype)
        b_pt = tl.trans(b_p)
        b_zz = dot(b_zh, tl.trans(b_zh), b_zz, PRECISION)
        b_zp = dot(b_zh, b_pt, b_zp, PRECISION)
        b_pp = dot(b_p, b_pt, b_pp, PRECISION)
    partial += pid * (C * C + C * D + D * D + C + D)
    tl.store(partial + o_c[:, None] * C + o_c[None, :], b_zz, mask=m_c[:, None] & m_c[None, :])
    partial += C * C
    tl.store(partial + o_c[:, None] * D + o_d[None, :], b_zp, mask=m_c[:, None] & m_d[None, :])
    partial += C * D
    tl.store(partial + o_d[:, None] * D + o_d[None, :], b_pp, mask=m_d[:, None] & m_d[None, :])
    partial += D * D
    tl.store(partial + o_c, b_zs, mask=m_c)
    tl.store(partial + C + o_d, b_ps, mask=m_d)


@triton.jit
def normalise_kernel(
    x, p, u, mean, rstd, N, eps, sxb, sxc, sxn, spb, spc, spn, sub, suc, sun,
    C: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """u = [z; p; 1] in x's dtype, R rows: u uᵀ by the vendor's GEMM holds all moments. Grid: (B·pixel blocks,)."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    pid_b = pid // blocks
    o_c, o_d, o_r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D), tl.arange(0, 32)
    o_n = (pid % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c, m_n = o_c < C, o_n < N
    u += pid_b * sub
    mask = m_c[:, None] & m_n[None, :]
    b_x = tl.load(x + pid_b * sxb + offsets_2d(o_c, o_n, sxc, sxn, WIDE), mask=mask, other=0.0).to(ACC)
    b_mean = tl.sum(b_x, 0) / C
    b_z = tl.where(m_c[:, None], b_x - b_mean[None, :], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_z * b_z, 0) / C + eps)
    tl.store(mean + pid_b * N + o_n, b_mean, mask=m_n)
    tl.store(rstd + pid_b * N + o_n, b_rstd, mask=m_n)
    b_z = (b_z * b_rstd[None, :]).to(u.dtype.element_ty)
    tl.store(u + offsets_2d(o_c, o_n, suc, sun, WIDE), b_z, mask=mask)
    mask = (o_d < D)[:, None] & m_n[None, :]
    b_p = tl.load(p + pid_b * spb + offsets_2d(o_d, o_n, spc, spn, WIDE), mask=mask, other=0.0)
    tl.store(u + offsets_2d(C + o_d, o_n, suc, sun, WIDE), b_p, mask=mask)
    ones = tl.full((32, BLOCK_N), 1.0, u.dtype.element_ty)
    tl.store(u + offsets_2d(C + D + o_r, o_n, suc, sun, WIDE), ones, mask=(C + D + o_r < R)[:, None] & m_n[None, :])


@triton.jit
def apply_kernel(
    x, p, y, mean, rstd, gain, shift, units, N, C, D, batch,
    sxb, sxc, sxn, spb, spc, spn, syb, syc, syn,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = x + z ⊙ (gain p) + shift p. Grid: (B·pixel blocks, channel tiles)."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    pid_b = pid // blocks
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_n = (pid % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    mask = (o_c < C)[:, None] & m_n[None, :]
    gain += pid_b * C * D
    shift += pid_b * C * D
    p += pid_b * spb
    b_gain = tl.zeros((BLOCK_C, BLOCK_N), ACC)
    b_shift = tl.zeros((BLOCK_C, BLOCK_N), ACC)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_p = (o_d < D)[:, None] & m_n[None, :]
        b_p = tl.load(p + offsets_2d(o_d, o_n, spc, spn, WIDE), mask=m_p, other=0.0)
        b_gain = dot(load_matrix(gain, o_c, o_d, C, D), b_p, b_gain, PRECISION)
        b_shift = dot(load_matrix(shift, o_c, o_d, C, D), b_p, b_shift, PRECISION)
    b_gain = b_gain * load_unit(units, 0, batch, pid_b, SCALED, ACC)
    b_shift = b_shift * load_unit(units, 1, batch, pid_b, SCALED, ACC)
    b_x = tl.load(x + pid_b * sxb + offsets_2d(o_c, o_n, sxc, sxn, WIDE), mask=mask, other=0.0).to(ACC)
    b_mean = tl.load(mean + pid_b * N + o_n, mask=m_n, other=0.0)
    b_rstd = tl.load(rstd + pid_b * N + o_n, mask=m_n, other=0.0)
    b_y = b_x + ((b_x - b_mean[None, :]) * b_rstd[None, :] * b_gain + b_shift)
    b_y = b_y.to(y.dtype.element_ty)
    tl.store(y + pid_b * syb + offsets_2d(o_c, o_n, syc, syn, WIDE), b_y, mask=mask)


def precision(dtype: torch.dtype) -> str:
    """fp32 operands: three tf32 products keep fp32's accuracy on NVIDIA's tensor cores; exact products elsewhere."""
    on_cuda = not INTERPRETING and isinstance(target_architecture(), int)
    return "tf32x3" if dtype == torch.float32 and on_cuda else "ieee"


def options(dtype: torch.dtype, *maps: Tensor) -> dict:
    """Constants that every kernel takes."""
    return {"ACC": tl.float64 if dtype == torch.float64 else tl.float32, "WIDE": needs_int64(*maps)}


def gram_pass(x: Tensor, p: Tensor, eps: float) -> tuple[Moments, Tensor, Tensor, Tensor]:
    """First pass over x [B, C, N], p [B, D, N]: Grams, the state rows, mean and 1/std [B, N].

    The Grams lie in the state, or in the wide route's square matrix, from where the algebra copies them.
    """
    B, C, N = x.shape
    D, acc = p.shape[1], accumulator(x.dtype)
    mean = torch.empty((B, N), dtype=acc, device=x.device)
    rstd = torch.empty((B, N), dtype=acc, device=x.device)
    state = new_state(x, D)
    with device_guard(x):
        if not fused("gram", C, D, x.dtype):
            return square_moments(_gemm_grams(x, p, eps, mean, rstd), C, D), state, mean, rstd
        config = launch_config("gram", C, D, x.dtype)
        splits, steps = splits_over_pixels(N, B, config["BLOCK_N"])
        partial = torch.empty((B, splits, gram_size(C, D)), dtype=acc, device=x.device)
        gram_kernel[(B * splits,)](
            x, p, mean, rstd, partial, N, steps, eps, *x.stride(), *p.stride(), C=C, D=D, BLOCK_C=tile_width(C),
            BLOCK_D=tile_width(D), PRECISION=precision(x.dtype), **options(x.dtype, x, p), **config,
        )  # fmt: skip
        sum_splits(partial, state)
    return flat_moments(state, C, D), state, mean, rstd


def _gemm_grams(x: Tensor, p: Tensor, eps: float, mean: Tensor, rstd: Tensor) -> Tensor:
    """[B, R, R] = u uᵀ, u = [z; p; 1, …], R = C + D + 1 rounded up to 16: every moment in one GEMM."""
    B, C, N = x.shape
    D, last = p.shape[1], x.stride(1) == 1 and N > 1
    R = -(-(C + D + 1) // 16) * 16
    u = torch.empty((B, N, R) if last else (B, R, N), dtype=x.dtype, device=x.device)
    u = u.mT if last else u
    config = launch_config("normalise", C, D, x.dtype)
    normalise_kernel[(B * triton.cdiv(N, config["BLOCK_N"]),)](
        x, p, u, mean, rstd, N, eps, *x.stride(), *p.stride(), *u.stride(), C=C, D=D, R=R, BLOCK_C=tile_width(C),
        BLOCK_D=tile_width(D), **options(x.dtype, x, p, u), **config,
    )  # fmt: skip
    acc = accumulator(x.dtype)
    if not u.is_cpu and torch.version.hip is None and u.dtype != acc:
        return torch.bmm(u, u.mT, out_dtype=acc)  # fp32 sums and result of half operands
    return torch.bmm(u.to(acc), u.mT.to(acc))


def apply_pass(x: Tensor, p: Tensor, mean: Tensor, rstd: Tensor, coefficients: Coefficients, y: Tensor) -> None:
    """Second pass: y = x + z ⊙ (gain p) + shift p, written into y."""
    B, C, N = x.shape
    D, (gain, shift, units, *_) = p.shape[1], coefficients
    with device_guard(x):
        config = launch_config("apply", C, D, x.dtype)
        grid = (B * triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(C, config["BLOCK_C"]))
        apply_kernel[grid](
            x, p, y, mean, rstd, gain, shift, units, N, C, D, B, *x.stride(), *p.stride(), *y.stride(),
            PRECISION=precision(x.dtype), SCALED=x.dtype == torch.float16, **options(x.dtype, x, p, y), **config,
        )  # fmt: skip
