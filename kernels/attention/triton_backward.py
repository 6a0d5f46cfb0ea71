"""Backward passes of semantic attention in Triton; see triton.py for names and rules."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.algebra_launch import Coefficients
from kernels.attention.algebra_tiles import sum_splits
from kernels.attention.configs import fused, launch_config, tile_width
from kernels.attention.triton_forward import dot, load_matrix, load_unit, offsets_2d, options, precision
from kernels.runtime import accumulator, device_guard, splits_over_pixels


@triton.jit
def reduce_kernel(
    dy, x, p, mean, rstd, partial, N, C, D, steps,
    syb, syc, syn, sxb, sxc, sxn, spb, spc, spn,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """This split's share of Σ (dY ⊙ z) pᵀ and Σ dY pᵀ. Grid: (B·splits, channel tiles of x, channel tiles of p)."""
    pid = tl.program_id(0).to(tl.int64)
    splits = tl.cdiv(N, steps * BLOCK_N)
    pid_b, pid_s = pid // splits, pid % splits
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_c, m_d = o_c < C, o_d < D
    dy += pid_b * syb
    x += pid_b * sxb
    p += pid_b * spb
    mean += pid_b * N
    rstd += pid_b * N
    b_gain = tl.zeros((BLOCK_C, BLOCK_D), ACC)
    b_shift = tl.zeros((BLOCK_C, BLOCK_D), ACC)
    first = pid_s.to(tl.int32) * steps * BLOCK_N
    for step in range(steps):
        o_n = first + step * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        mask = m_c[:, None] & m_n[None, :]
        b_dy = tl.load(dy + offsets_2d(o_c, o_n, syc, syn, WIDE), mask=mask, other=0.0)
        b_x = tl.load(x + offsets_2d(o_c, o_n, sxc, sxn, WIDE), mask=mask, other=0.0).to(ACC)
        b_p = tl.load(p + offsets_2d(o_d, o_n, spc, spn, WIDE), mask=m_d[:, None] & m_n[None, :], other=0.0)
        b_mean = tl.load(mean + o_n, mask=m_n, other=0.0)
        b_rstd = tl.load(rstd + o_n, mask=m_n, other=0.0)
        b_pt = tl.trans(b_p)
        b_e = (b_dy.to(ACC) * ((b_x - b_mean[None, :]) * b_rstd[None, :])).to(b_p.dtype)
        b_gain = dot(b_e, b_pt, b_gain, PRECISION)
        b_shift = dot(b_dy, b_pt, b_shift, PRECISION)
    o_w = o_c[:, None] * D + o_d[None, :]
    m_w = m_c[:, None] & m_d[None, :]
    partial += pid * 2 * C * D
    tl.store(partial + o_w, b_gain, mask=m_w)
    tl.store(partial + C * D + o_w, b_shift, mask=m_w)


@triton.jit
def gradient_kernel(
    dy, x, p, mean, rstd, gain, shift, cross, hzz, hpp, dzs, dps, units, dx, dp, N, batch,
    syb, syc, syn, sxb, sxc, sxn, spb, spc, spn, sub, suc, sun, svb, svc, svn,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx and dp of a block of pixels with all their channels. Grid: (B·pixel blocks,)."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    pid_b = pid // blocks
    o_c, o_d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    o_n = (pid % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c, m_d, m_n = o_c < C, o_d < D, o_n < N
    m_x, m_p = m_c[:, None] & m_n[None, :], m_d[:, None] & m_n[None, :]
    b_dy = tl.load(dy + pid_b * syb + offsets_2d(o_c, o_n, syc, syn, WIDE), mask=m_x, other=0.0)
    b_x = tl.load(x + pid_b * sxb + offsets_2d(o_c, o_n, sxc, sxn, WIDE), mask=m_x, other=0.0).to(ACC)
    b_p = tl.load(p + pid_b * spb + offsets_2d(o_d, o_n, spc, spn, WIDE), mask=m_p, other=0.0)
    b_mean = tl.load(mean + pid_b * N + o_n, mask=m_n, other=0.0)
    b_rstd = tl.load(rstd + pid_b * N + o_n, mask=m_n, other=0.0)
    b_z = tl.where(m_c[:, None], (b_x - b_mean[None, :]) * b_rstd[None, :], 0.0)
    b_zh = b_z.to(b_p.dtype)

    b_gain = load_matrix(gain + pid_b * C * D, o_c, o_d, C, D)
    b_cross = load_matrix(cross + pid_b * C * D, o_c, o_d, C, D)
    # A unit of 1 that the compiler knows would make it add each product into the next one's sums; such a chain gets
    # all warps along the rows: eight, where a tile of 64 rows has work for four, and half compute the same again.
    one_x, one_p = tl.full((), 1.0, ACC), tl.full((), 1.0, ACC)
    if BLOCK_C < 128:
        one_x = tl.where(N > 0, 1.0, 0.0).to(ACC)
    if BLOCK_D < 128:
        one_p = tl.where(N > 0, 1.0, 0.0).to(ACC)
    u_gain = load_unit(units, 0, batch, pid_b, SCALED, ACC)
    u_shift = load_unit(units, 1, batch, pid_b, SCALED, ACC) * one_p
    u_cross = load_unit(units, 2, batch, pid_b, SCALED, ACC)
    u_hzz = load_unit(units, 3, batch, pid_b, SCALED, ACC) * one_x
    u_hpp = load_unit(units, 4, batch, pid_b, SCALED, ACC) * one_p
    zero_x, zero_p = tl.zeros((BLOCK_C, BLOCK_N), ACC), tl.zeros((BLOCK_D, BLOCK_N), ACC)

    b_dz = dot(b_gain, b_p, zero_x, PRECISION) * (u_gain * one_x) * b_dy.to(ACC)
    b_dz += dot(b_cross, b_p, zero_x, PRECISION) * (u_cross * one_x)
    b_hzz = load_matrix(hzz + pid_b * C * C, o_c, o_c, C, C)
    b_dz += dot(b_hzz, b_zh, zero_x, PRECISION) * u_hzz
    b_dz += tl.load(dzs + pid_b * C + o_c, mask=m_c, other=0.0)[:, None]
    b_level = tl.sum(b_dz, 0) / C
    b_along = tl.sum(b_dz * b_z, 0) / C
    b_dx = b_dy.to(ACC) + b_rstd[None, :] * (b_dz - b_level[None, :] - b_z * b_along[None, :])
    b_dx = b_dx.to(dx.dtype.element_ty)
    tl.store(dx + pid_b * sub + offsets_2d(o_c, o_n, suc, sun, WIDE), b_dx, mask=m_x)

    b_e = (b_dy.to(ACC) * b_z).to(b_p.dtype)
    b_dp = dot(tl.trans(b_gain), b_e, zero_p, PRECISION) * (u_gain * one_p)
    b_shift = load_matrix(shift + pid_b * C * D, o_c, o_d, C, D)
    b_dp += dot(tl.trans(b_shift), b_dy, zero_p, PRECISION) * u_shift
    b_dp += dot(tl.trans(b_cross), b_zh, zero_p, PRECISION) * (u_cross * one_p)
    b_hpp = load_matrix(hpp + pid_b * D * D, o_d, o_d, D, D)
    b_dp += dot(b_hpp, b_p, zero_p, PRECISION) * u_hpp
    b_dp += tl.load(dps + pid_b * D + o_d, mask=m_d, other=0.0)[:, None]
    b_dp = b_dp.to(dp.dtype.element_ty)
    tl.store(dp + pid_b * svb + offsets_2d(o_d, o_n, svc, svn, WIDE), b_dp, mask=m_p)


@triton.jit
def feature_gradient_kernel(
    dy, x, p, mean, rstd, gain, cross, hzz, dzs, units, dz, N, C, D, batch,
    syb, syc, syn, sxb, sxc, sxn, spb, spc, spn, sub, suc, sun,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dz = dY ⊙ (gain p) + cross p + hzz z + dzs for wide maps, fp32. Grid: (B·pixel blocks, channel tiles)."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    pid_b = pid // blocks
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_n = (pid % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c, m_n = o_c < C, o_n < N
    x += pid_b * sxb
    p += pid_b * spb
    b_mean = tl.load(mean + pid_b * N + o_n, mask=m_n, other=0.0)
    b_rstd = tl.load(rstd + pid_b * N + o_n, mask=m_n, other=0.0)
    b_gain = tl.zeros((BLOCK_C, BLOCK_N), ACC)
    b_dz = tl.zeros((BLOCK_C, BLOCK_N), ACC)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_p = (o_d < D)[:, None] & m_n[None, :]
        b_p = tl.load(p + offsets_2d(o_d, o_n, spc, spn, WIDE), mask=m_p, other=0.0)
        b_gain = dot(load_matrix(gain + pid_b * C * D, o_c, o_d, C, D), b_p, b_gain, PRECISION)
        b_dz = dot(load_matrix(cross + pid_b * C * D, o_c, o_d, C, D), b_p, b_dz, PRECISION)
    m_x = m_c[:, None] & m_n[None, :]
    b_dy = tl.load(dy + pid_b * syb + offsets_2d(o_c, o_n, syc, syn, WIDE), mask=m_x, other=0.0).to(ACC)
    b_gain = b_gain * load_unit(units, 0, batch, pid_b, SCALED, ACC) * b_dy
    b_gain += b_dz * load_unit(units, 2, batch, pid_b, SCALED, ACC)
    b_dz = tl.zeros((BLOCK_C, BLOCK_N), ACC)
    for k in range(0, C, BLOCK_D):
        o_k = k + tl.arange(0, BLOCK_D)
        m_k = (o_k < C)[:, None] & m_n[None, :]
        b_x = tl.load(x + offsets_2d(o_k, o_n, sxc, sxn, WIDE), mask=m_k, other=0.0)
        b_z = tl.where(m_k, (b_x.to(ACC) - b_mean[None, :]) * b_rstd[None, :], 0.0).to(b_x.dtype)
        b_dz = dot(load_matrix(hzz + pid_b * C * C, o_c, o_k, C, C), b_z, b_dz, PRECISION)
    b_dz = b_dz * load_unit(units, 3, batch, pid_b, SCALED, ACC) + b_gain
    b_dz += tl.load(dzs + pid_b * C + o_c, mask=m_c, other=0.0)[:, None]
    tl.store(dz + pid_b * sub + offsets_2d(o_c, o_n, suc, sun, WIDE), b_dz, mask=m_x)


@triton.jit
def norm_gradient_kernel(
    dy, x, dz, mean, rstd, dx, N, syb, syc, syn, sxb, sxc, sxn, szb, szc, szn, sub, suc, sun,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx = dY + (dz − mean_c dz − z · mean_c(dz ⊙ z)) / std for wide maps. Grid: (B·pixel blocks,)."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    pid_b = pid // blocks
    o_c = tl.arange(0, BLOCK_C)
    o_n = (pid % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    mask = (o_c < C)[:, None] & m_n[None, :]
    b_dy = tl.load(dy + pid_b * syb + offsets_2d(o_c, o_n, syc, syn, WIDE), mask=mask, other=0.0).to(ACC)
    b_x = tl.load(x + pid_b * sxb + offsets_2d(o_c, o_n, sxc, sxn, WIDE), mask=mask, other=0.0).to(ACC)
    b_dz = tl.load(dz + pid_b * szb + offsets_2d(o_c, o_n, szc, szn, WIDE), mask=mask, other=0.0)
    b_mean = tl.load(mean + pid_b * N + o_n, mask=m_n, other=0.0)
    b_rstd = tl.load(rstd + pid_b * N + o_n, mask=m_n, other=0.0)
    b_z = (b_x - b_mean[None, :]) * b_rstd[None, :]
    b_level = tl.sum(b_dz, 0) / C
    b_along = tl.sum(b_dz * b_z, 0) / C
    b_dx = b_dy + b_rstd[None, :] * (b_dz - b_level[None, :] - b_z * b_along[None, :])
    tl.store(dx + pid_b * sub + offsets_2d(o_c, o_n, suc, sun, WIDE), b_dx.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def prior_gradient_kernel(
    dy, x, p, mean, rstd, gain, shift, cross, hpp, dps, units, dp, N, C, D, batch,
    syb, syc, syn, sxb, sxc, sxn, spb, spc, spn, svb, svc, svn,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dp = gainᵀ(dY ⊙ z) + shiftᵀ dY + crossᵀ z + hpp p + dps for wide maps. Grid: (B·pixel blocks, tiles of D)."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    pid_b = pid // blocks
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = (pid % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_d, m_n = o_d < D, o_n < N
    dy += pid_b * syb
    x += pid_b * sxb
    p += pid_b * spb
    b_mean = tl.load(mean + pid_b * N + o_n, mask=m_n, other=0.0)
    b_rstd = tl.load(rstd + pid_b * N + o_n, mask=m_n, other=0.0)
    u_gain = load_unit(units, 0, batch, pid_b, SCALED, ACC)
    u_shift = load_unit(units, 1, batch, pid_b, SCALED, ACC)
    u_cross = load_unit(units, 2, batch, pid_b, SCALED, ACC)
    b_dp = tl.zeros((BLOCK_D, BLOCK_N), ACC)
    zero = tl.zeros((BLOCK_D, BLOCK_N), ACC)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_x = (o_c < C)[:, None] & m_n[None, :]
        b_dy = tl.load(dy + offsets_2d(o_c, o_n, syc, syn, WIDE), mask=m_x, other=0.0)
        b_x = tl.load(x + offsets_2d(o_c, o_n, sxc, sxn, WIDE), mask=m_x, other=0.0)
        b_z = tl.where(m_x, (b_x.to(ACC) - b_mean[None, :]) * b_rstd[None, :], 0.0)
        b_e = (b_dy.to(ACC) * b_z).to(b_x.dtype)
        b_gain = tl.trans(load_matrix(gain + pid_b * C * D, o_c, o_d, C, D))
        b_shift = tl.trans(load_matrix(shift + pid_b * C * D, o_c, o_d, C, D))
        b_cross = tl.trans(load_matrix(cross + pid_b * C * D, o_c, o_d, C, D))
        if SCALED:
            b_dp += dot(b_gain, b_e, zero, PRECISION) * u_gain
            b_dp += dot(b_shift, b_dy, zero, PRECISION) * u_shift
            b_dp += dot(b_cross, b_z.to(b_x.dtype), zero, PRECISION) * u_cross
        else:
            b_dp = dot(b_gain, b_e, b_dp, PRECISION)
            b_dp = dot(b_shift, b_dy, b_dp, PRECISION)
            b_dp = dot(b_cross, b_z.to(b_x.dtype), b_dp, PRECISION)
    for k in range(0, D, BLOCK_C):
        o_k = k + tl.arange(0, BLOCK_C)
        b_p = tl.load(p + offsets_2d(o_k, o_n, spc, spn, WIDE), mask=(o_k < D)[:, None] & m_n[None, :], other=0.0)
        zero = dot(load_matrix(hpp + pid_b * D * D, o_d, o_k, D, D), b_p, zero, PRECISION)
    b_dp += zero * load_unit(units, 4, batch, pid_b, SCALED, ACC)
    b_dp += tl.load(dps + pid_b * D + o_d, mask=m_d, other=0.0)[:, None]
    b_dp = b_dp.to(dp.dtype.element_ty)
    tl.store(dp + pid_b * svb + offsets_2d(o_d, o_n, svc, svn, WIDE), b_dp, mask=m_d[:, None] & m_n[None, :])


def reduce_pass(dy: Tensor, x: Tensor, p: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """First backward pass: gradients of gain and shift [B, 2, C, D]."""
    B, C, N = x.shape
    D, acc = p.shape[1], accumulator(x.dtype)
    total = torch.empty((B, 2, C, D), dtype=acc, device=x.device)
    with device_guard(x):
        config = launch_config("reduce", C, D, x.dtype)
        splits, steps = splits_over_pixels(N, B, config["BLOCK_N"])
        partial = torch.empty((B, splits, 2 * C * D), dtype=acc, device=x.device)
        grid = (B * splits, triton.cdiv(C, config["BLOCK_C"]), triton.cdiv(D, config["BLOCK_D"]))
        reduce_kernel[grid](
            dy, x, p, mean, rstd, partial, N, C, D, steps, *dy.stride(), *x.stride(), *p.stride(),
            PRECISION=precision(x.dtype), **options(x.dtype, dy, x, p), **config,
        )  # fmt: skip
        sum_splits(partial, total)
    return total


def gradient_pass(
    dy: Tensor,
    x: Tensor,
    p: Tensor,
    mean: Tensor,
    rstd: Tensor,
    coefficients: Coefficients,
    dx: Tensor,
    dp: Tensor,
) -> None:
    """Second backward pass, written into dx and dp."""
    gain, shift, units, cross, hzz, hpp, dzs, dps = coefficients
    with device_guard(x):
        if fused("gradient", x.shape[1], p.shape[1], x.dtype):
            _fused_gradients(dy, x, p, mean, rstd, gain, shift, cross, hzz, hpp, dzs, dps, units, dx, dp)
        else:
            _tiled_gradients(dy, x, p, mean, rstd, gain, shift, cross, hzz, hpp, dzs, dps, units, dx, dp)


def _fused_gradients(dy, x, p, mean, rstd, gain, shift, cross, hzz, hpp, dzs, dps, units, dx, dp) -> None:
    B, C, N = x.shape
    D = p.shape[1]
    config = launch_config("gradient", C, D, x.dtype)
    gradient_kernel[(B * triton.cdiv(N, config["BLOCK_N"]),)](
        dy, x, p, mean, rstd, gain, shift, cross, hzz, hpp, dzs, dps, units, dx, dp, N, B,
        *dy.stride(), *x.stride(), *p.stride(), *dx.stride(), *dp.stride(),
        C=C, D=D, BLOCK_C=tile_width(C), BLOCK_D=tile_width(D), PRECISION=precision(x.dtype),
        SCALED=x.dtype == torch.float16, **options(x.dtype, dy, x, p, dx, dp), **config,
    )  # fmt: skip


def _tiled_gradients(dy, x, p, mean, rstd, gain, shift, cross, hzz, hpp, dzs, dps, units, dx, dp) -> None:
    B, C, N = x.shape
    D = p.shape[1]
    dz = torch.empty_like(dx, dtype=accumulator(x.dtype))  # dense and laid out as dx
    common = options(x.dtype, dy, x, p, dx, dp)
    dots = {"PRECISION": precision(x.dtype), "SCALED": x.dtype == torch.float16}
    config = launch_config("feature_gradient", C, D, x.dtype)
    grid = (B * triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(C, config["BLOCK_C"]))
    feature_gradient_kernel[grid](
        dy, x, p, mean, rstd, gain, cross, hzz, dzs, units, dz, N, C, D, B,
        *dy.stride(), *x.stride(), *p.stride(), *dz.stride(), **dots, **common, **config,
    )  # fmt: skip
    config = launch_config("norm_gradient", C, C, x.dtype)
    norm_gradient_kernel[(B * triton.cdiv(N, config["BLOCK_N"]),)](
        dy, x, dz, mean, rstd, dx, N, *dy.stride(), *x.stride(), *dz.stride(), *dx.stride(),
        C=C, BLOCK_C=tile_width(C), **common, **config,
    )  # fmt: skip
    config = launch_config("prior_gradient", C, D, x.dtype)
    grid = (B * triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(D, config["BLOCK_D"]))
    prior_gradient_kernel[grid](
        dy, x, p, mean, rstd, gain, shift, cross, hpp, dps, units, dp, N, C, D, B,
        *dy.stride(), *x.stride(), *p.stride(), *dp.stride(), **dots, **common, **config,
    )  # fmt: skip
