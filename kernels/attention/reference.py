"""Semantic attention in plain PyTorch: the composed form (the oracle) and the passes of the Gram form.

The Gram passes are what a machine without a GPU runs. They walk over the pixels in chunks, so that nothing of the
features' size is ever made except results, and they keep nothing for the backward pass but two numbers a pixel.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.algebra import (
    ABSOLUTE_FLOOR,
    RELATIVE_FLOOR,
    Grams,
    Modulation,
    Weights,
    modulation,
    modulation_backward,
    split_grams,
)
from kernels.runtime import accumulator

# Elements of one chunk of X. Measured on two CPU cores at C = D = 64: half a megabyte of fp32 stays in the L2 cache.
CHUNK_ELEMENTS = 1 << 17


def composed_attention(x: Tensor, p: Tensor, weights: Weights, eps: float = 1e-6) -> Tensor:
    """Semantic attention as written in METHOD: q, k, v, an attention map and its product, all in memory. The oracle.

    x [B, C, H, W], p [B, D, H, W] → [B, C, H, W], in x's dtype; statistics and softmax in fp32 (fp64 for fp64).
    """
    w, acc = weights, accumulator(x.dtype)
    B, C, H, W = x.shape
    heads = w.temperature.numel()
    normed = F.layer_norm(x.permute(0, 2, 3, 1).to(acc), (C,), w.norm_weight.to(acc), w.norm_bias.to(acc), eps)
    normed = normed.permute(0, 3, 1, 2).flatten(2)  # [B, C, N]
    p = p.flatten(2)
    # The floors of the two forms are one formula: see algebra.row_norm.
    bound_x, bound_p = normed.square().sum((1, 2)), p.to(acc).square().sum((1, 2))
    normed = normed.to(x.dtype)
    query, key, value = w.query.to(x.dtype) @ normed, w.key.to(x.dtype) @ p, w.value.to(x.dtype) @ p

    def unit(rows: Tensor, weight: Tensor, bound: Tensor) -> Tensor:
        squares = rows.to(acc).square().sum(2)
        floor = RELATIVE_FLOOR * weight.to(acc).square().sum(1) * bound[:, None] + ABSOLUTE_FLOOR * rows.shape[2]
        rows = rows.to(acc) * torch.maximum(squares, floor).rsqrt()[..., None]
        return rows.to(x.dtype).unflatten(1, (heads, C // heads))

    cosine = unit(query, w.query, bound_x) @ unit(key, w.key, bound_p).mT  # [B, h, d, d]
    attention = torch.softmax(w.temperature.to(acc)[:, None, None] * cosine.to(acc), dim=-1).to(x.dtype)
    attended = (attention @ value.unflatten(1, (heads, C // heads))).flatten(1, 2)
    gain, shift = (w.out.to(x.dtype) @ attended).chunk(2, dim=1)
    update = w.scale.to(x.dtype)[:, None] * (normed * gain + shift)
    return x + update.view(B, C, H, W)


def _chunks(x: Tensor) -> Iterator[slice]:
    pixels = x.shape[2]
    step = max(256, CHUNK_ELEMENTS // x.shape[1])
    return (slice(start, min(start + step, pixels)) for start in range(0, pixels, step))


def gram_pass(x: Tensor, p: Tensor, eps: float) -> tuple[Grams, Tensor, Tensor]:
    """First pass over x [B, C, N], p [B, D, N]: Grams, mean [B, N] and 1/std [B, N] over channels, in fp32 (fp64)."""
    acc = accumulator(x.dtype)
    B, C, N = x.shape
    D = p.shape[1]
    zz, zp, pp = (x.new_zeros(shape, dtype=acc) for shape in ((B, C, C), (B, C, D), (B, D, D)))
    z_sum, p_sum = x.new_zeros(B, C, dtype=acc), x.new_zeros(B, D, dtype=acc)
    mean, rstd = x.new_empty(B, N, dtype=acc), x.new_empty(B, N, dtype=acc)
    for b in range(B):
        for n in _chunks(x):
            zc, pc = x[b, :, n].to(acc), p[b, :, n].to(acc)
            torch.mean(zc, 0, out=mean[b, n])
            zc = zc - mean[b, n]
            rstd[b, n] = (torch.linalg.vecdot(zc, zc, dim=0) / C + eps).rsqrt_()
            zc *= rstd[b, n]
            zz[b].addmm_(zc, zc.T)
            zp[b].addmm_(zc, pc.T)
            pp[b].addmm_(pc, pc.T)
            z_sum[b] += zc.sum(1)
            p_sum[b] += pc.sum(1)
    return Grams(zz, zp, pp, z_sum, p_sum), mean, rstd


def apply_pass(x: Tensor, p: Tensor, mean: Tensor, rstd: Tensor, coefficients: Modulation, y: Tensor) -> None:
    """Second pass: y = x + z ⊙ (gain p) + shift p, written into y."""
    acc = accumulator(x.dtype)
    for b in range(x.shape[0]):
        for n in _chunks(x):
            xc, pc = x[b, :, n].to(acc), p[b, :, n].to(acc)
            update = coefficients.gain[b] @ pc
            update *= (xc - mean[b, n]) * rstd[b, n]
            update.addmm_(coefficients.shift[b], pc)
            y[b, :, n] = update.add_(xc)


def reduce_pass(dy: Tensor, x: Tensor, p: Tensor, mean: Tensor, rstd: Tensor) -> Modulation:
    """First backward pass: gradients of the modulation matrices, Σ (dY ⊙ z) pᵀ and Σ dY pᵀ."""
    acc = accumulator(x.dtype)
    gain = x.new_zeros(x.shape[0], x.shape[1], p.shape[1], dtype=acc)
    shift = torch.zeros_like(gain)
    for b in range(x.shape[0]):
        for n in _chunks(x):
            dyc, pc = dy[b, :, n].to(acc), p[b, :, n].to(acc)
            shift[b].addmm_(dyc, pc.T)
            zc = (x[b, :, n].to(acc) - mean[b, n]).mul_(rstd[b, n])
            gain[b].addmm_(zc.mul_(dyc), pc.T)
    return Modulation(gain, shift)


def gradient_pass(
    dy: Tensor,
    x: Tensor,
    p: Tensor,
    mean: Tensor,
    rstd: Tensor,
    coefficients: Modulation,
    d_grams: Grams,
    dx: Tensor,
    dp: Tensor,
) -> None:
    """Second backward pass, written into dx and dp. d_grams: gradients of the Grams, zz and pp symmetric."""
    acc = accumulator(x.dtype)
    for b in range(x.shape[0]):
        gain, shift, cross = coefficients.gain[b], coefficients.shift[b], d_grams.zp[b]
        for n in _chunks(x):
            dyc, pc, inverse = dy[b, :, n].to(acc), p[b, :, n].to(acc), rstd[b, n]
            zc = (x[b, :, n].to(acc) - mean[b, n]).mul_(inverse)
            dz = (gain @ pc).mul_(dyc).addmm_(cross, pc).addmm_(d_grams.zz[b], zc, alpha=2).add_(d_grams.z[b][:, None])
            dpc = (cross.T @ zc).addmm_(shift.T, dyc).addmm_(d_grams.pp[b], pc, alpha=2).add_(d_grams.p[b][:, None])
            dp[b, :, n] = dpc.addmm_(gain.T, dyc * zc)
            along = torch.linalg.vecdot(dz, zc, dim=0) / dz.shape[0]
            dz -= dz.mean(0)
            dx[b, :, n] = dz.addcmul_(zc, along, value=-1).mul_(inverse).add_(dyc)


def forward(x: Tensor, p: Tensor, weights: Weights, eps: float, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y of x [B, C, N] and p [B, D, N], written into y; mean and 1/std [B, N], and the flat Grams [B, gram_size]."""
    grams, mean, rstd = gram_pass(x, p, eps)
    apply_pass(x, p, mean, rstd, modulation(grams, weights, x.shape[2]), y)
    return mean, rstd, torch.cat([moment.flatten(1) for moment in grams], dim=1)


def backward(
    dy: Tensor,
    x: Tensor,
    p: Tensor,
    weights: Weights,
    mean: Tensor,
    rstd: Tensor,
    state: Tensor,
    dx: Tensor,
    dp: Tensor,
) -> Weights:
    """The weights' gradients; those of x and p are written into dx and dp."""
    d_modulation = reduce_pass(dy, x, p, mean, rstd)
    grams = split_grams(state, x.shape[1], p.shape[1])
    coefficients, d_grams, d_weights = modulation_backward(grams, weights, x.shape[2], d_modulation)
    gradient_pass(dy, x, p, mean, rstd, coefficients, d_grams, dx, dp)
    return d_weights
