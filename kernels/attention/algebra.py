"""The small algebra of semantic attention: Gram matrices and weights to modulation matrices, and its exact adjoint.

Shapes: B batch, C image channels, D prior channels, h heads of d = C/h channels, N pixels. Everything here is O(C²·D) a
sample, free of the number of pixels, and always fp32 (fp64 for fp64 inputs). Derivation: README.md beside this file.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# A quadratic form wSwᵀ is at most ‖w‖²·tr(S) and, accumulated in fp32, carries an error of a few 1e-7 of that bound:
# below RELATIVE_FLOOR of it there is rounding, not signal. ABSOLUTE_FLOOR is the mean square below which a row is null.
RELATIVE_FLOOR = 1e-6
ABSOLUTE_FLOOR = 1e-12


class Weights(NamedTuple):
    """Parameters of semantic attention, in the order of the public function."""

    norm_weight: Tensor  # [C]     γ
    norm_bias: Tensor  # [C]     β
    query: Tensor  # [C, C]
    key: Tensor  # [C, D]
    value: Tensor  # [C, D]
    temperature: Tensor  # [h]     τ
    out: Tensor  # [2C, C]
    scale: Tensor  # [C]     s


class Grams(NamedTuple):
    """Second and first moments of z (x normalised over channels, before γ and β) and p, summed over the N pixels."""

    zz: Tensor  # [B, C, C]
    zp: Tensor  # [B, C, D]
    pp: Tensor  # [B, D, D]
    z: Tensor  # [B, C]
    p: Tensor  # [B, D]


class Modulation(NamedTuple):
    """y = x + z ⊙ (gain p) + shift p, both [B, C, D]; γ, β and s are folded in."""

    gain: Tensor
    shift: Tensor


class _Saved(NamedTuple):
    projection: Tensor
    offset: Tensor
    trace: Tensor
    cross: Tensor
    raw: Tensor
    query_norm: "_Norm"
    key_norm: "_Norm"
    attention: Tensor
    attended: Tensor
    matrix: Tensor


class _Norm(NamedTuple):
    inverse: Tensor  # [B, C] 1 / ‖row‖ after the floor
    live: Tensor  # [B, C] bool: the row is above its floor, so its own norm (not the floor) carries the gradient


def split_grams(flat: Tensor, channels: int, prior_channels: int) -> Grams:
    """Views of the five moments inside one flat buffer [B, C² + C·D + D² + C + D]."""
    B, C, D = flat.shape[0], channels, prior_channels
    zz, zp, pp, z, p = flat.split([C * C, C * D, D * D, C, D], dim=1)
    return Grams(zz.view(B, C, C), zp.view(B, C, D), pp.view(B, D, D), z, p)


def gram_size(channels: int, prior_channels: int) -> int:
    """Entries of the flat Gram buffer of one sample."""
    C, D = channels, prior_channels
    return C * C + C * D + D * D + C + D


def row_norm(squares: Tensor, weight: Tensor, trace: Tensor, pixels: int) -> _Norm:
    """1/‖row‖ of a projected map from its squared norms [B, C], floored at 1e-6·‖w‖²·tr(S) and at an RMS of 1e-6."""
    floor = RELATIVE_FLOOR * weight.square().sum(1) * trace[:, None] + ABSOLUTE_FLOOR * pixels
    return _Norm(torch.maximum(squares, floor).rsqrt(), squares >= floor)


def _heads(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(-2, (heads, -1))  # [.., C, K] → [.., h, d, K]


def _forward(grams: Grams, w: Weights, pixels: int) -> _Saved:
    heads = w.temperature.numel()
    projection = w.query * w.norm_weight  # W_q x̂ = (W_q Γ) z + W_q β
    offset = w.query @ w.norm_bias
    cross = projection @ grams.zp + offset[:, None] * grams.p[:, None, :]  # W_q S_xp
    raw = _heads(cross, heads) @ _heads(w.key, heads).mT  # [B, h, d, d]

    query_squares = ((projection @ grams.zz) * projection).sum(2)
    query_squares = query_squares + 2 * offset * (grams.z @ projection.T) + pixels * offset.square()
    trace = grams.zz.diagonal(dim1=1, dim2=2) @ w.norm_weight.square() + 2 * grams.z @ (w.norm_weight * w.norm_bias)
    trace = trace + pixels * w.norm_bias.square().sum()
    query_norm = row_norm(query_squares, w.query, trace, pixels)
    key_squares = ((w.key @ grams.pp) * w.key).sum(2)
    key_norm = row_norm(key_squares, w.key, grams.pp.diagonal(dim1=1, dim2=2).sum(1), pixels)

    cosine = _heads(query_norm.inverse[..., None], heads) * raw * _heads(key_norm.inverse[..., None], heads).mT
    attention = torch.softmax(w.temperature[:, None, None] * cosine, dim=-1)
    attended = (attention @ _heads(w.value, heads)).flatten(1, 2)  # [B, C, D]
    matrix = w.out @ attended  # [B, 2C, D]: [g; b] = matrix · p
    return _Saved(projection, offset, trace, cross, raw, query_norm, key_norm, attention, attended, matrix)


def _fold(matrix: Tensor, w: Weights) -> Modulation:
    gain, shift = matrix.chunk(2, dim=1)
    scaled = w.scale[:, None] * gain
    return Modulation(w.norm_weight[:, None] * scaled, w.norm_bias[:, None] * scaled + w.scale[:, None] * shift)


def modulation(grams: Grams, weights: Weights, pixels: int) -> Modulation:
    """Modulation matrices of every sample from its Grams: [B, C, D] twice. Differentiable by autograd too."""
    return _fold(_forward(grams, weights, pixels).matrix, weights)


def modulation_backward(
    grams: Grams, weights: Weights, pixels: int, grad: Modulation
) -> tuple[Modulation, Grams, Weights]:
    """Adjoint of `modulation`: returns the modulation again (recomputed) and the gradients for Grams and weights.

    The gradients for zz and pp are symmetric matrices: dL = ⟨grad.zz, dS⟩.
    """
    w = weights
    saved = _forward(grams, w, pixels)
    d_matrix, d_scale, d_gamma, d_beta = _fold_backward(saved.matrix, w, grad)

    heads = w.temperature.numel()
    d_out = torch.einsum("bkd,bcd->kc", d_matrix, saved.attended)
    d_attended = _heads(w.out.T @ d_matrix, heads)  # [B, h, d, D]
    d_value = (saved.attention.mT @ d_attended).sum(0).flatten(0, 1)
    d_attention = d_attended @ _heads(w.value, heads).mT
    d_logit = saved.attention * (d_attention - (d_attention * saved.attention).sum(-1, keepdim=True))

    inv_q = _heads(saved.query_norm.inverse[..., None], heads)  # [B, h, d, 1]
    inv_k = _heads(saved.key_norm.inverse[..., None], heads).mT  # [B, h, 1, d]
    d_cosine = w.temperature[:, None, None] * d_logit
    d_temperature = (d_logit * inv_q * saved.raw * inv_k).sum((0, 2, 3))
    d_raw = d_cosine * inv_q * inv_k
    d_query_squares = -0.5 * ((d_raw * saved.raw).sum(-1).flatten(1)) * saved.query_norm.inverse.square()
    d_key_squares = -0.5 * ((d_raw * saved.raw).sum(-2).flatten(1)) * saved.key_norm.inverse.square()

    d_cross = (d_raw @ _heads(w.key, heads)).flatten(1, 2)  # [B, C, D]
    d_key = (d_raw.mT @ _heads(saved.cross, heads)).sum(0).flatten(0, 1)
    d_projection = torch.einsum("bcd,bkd->ck", d_cross, grams.zp)
    d_offset = torch.einsum("bcd,bd->c", d_cross, grams.p)
    d_zp = saved.projection.T @ d_cross
    d_p = saved.offset @ d_cross

    own, floor = _route(d_query_squares, saved.query_norm)
    d_zz = saved.projection.T @ (own[..., None] * saved.projection)
    d_z = 2 * (own * saved.offset) @ saved.projection
    d_projection = d_projection + 2 * (own[..., None] * (saved.projection @ grams.zz)).sum(0)
    d_projection = d_projection + 2 * saved.offset[:, None] * (own.T @ grams.z)
    d_offset = d_offset + 2 * (own * (grams.z @ saved.projection.T)).sum(0) + 2 * pixels * own.sum(0) * saved.offset
    d_trace = RELATIVE_FLOOR * floor @ w.query.square().sum(1)  # [B]
    d_query = 2 * RELATIVE_FLOOR * (floor.T @ saved.trace)[:, None] * w.query
    zz_diagonal = grams.zz.diagonal(dim1=1, dim2=2)
    d_zz = d_zz + torch.diag_embed(d_trace[:, None] * w.norm_weight.square())
    d_z = d_z + 2 * d_trace[:, None] * (w.norm_weight * w.norm_bias)
    d_gamma = d_gamma + 2 * (w.norm_weight * (d_trace @ zz_diagonal) + w.norm_bias * (d_trace @ grams.z))
    d_beta = d_beta + 2 * (w.norm_weight * (d_trace @ grams.z) + pixels * d_trace.sum() * w.norm_bias)

    own, floor = _route(d_key_squares, saved.key_norm)
    key_trace = grams.pp.diagonal(dim1=1, dim2=2).sum(1)
    d_pp = w.key.T @ (own[..., None] * w.key)
    d_pp = d_pp + torch.diag_embed((RELATIVE_FLOOR * floor @ w.key.square().sum(1))[:, None].expand(-1, d_pp.shape[1]))
    d_key = d_key + 2 * (own[..., None] * (w.key @ grams.pp)).sum(0)
    d_key = d_key + 2 * RELATIVE_FLOOR * (floor.T @ key_trace)[:, None] * w.key

    d_query = d_query + d_projection * w.norm_weight + d_offset[:, None] * w.norm_bias
    d_gamma = d_gamma + (d_projection * w.query).sum(0)
    d_beta = d_beta + d_offset @ w.query
    d_weights = Weights(d_gamma, d_beta, d_query, d_key, d_value, d_temperature, d_out, d_scale)
    return _fold(saved.matrix, w), Grams(d_zz, d_zp, d_pp, d_z, d_p), d_weights


def _fold_backward(matrix: Tensor, w: Weights, grad: Modulation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gain, shift = matrix.chunk(2, dim=1)
    by_gain = (grad.gain * gain).sum((0, 2))  # per channel: ⟨d gain, g⟩, ⟨d shift, g⟩, ⟨d shift, b⟩
    shift_by_gain = (grad.shift * gain).sum((0, 2))
    d_scale = w.norm_weight * by_gain + w.norm_bias * shift_by_gain + (grad.shift * shift).sum((0, 2))
    d_gain = (w.scale * w.norm_weight)[:, None] * grad.gain + (w.scale * w.norm_bias)[:, None] * grad.shift
    d_matrix = torch.cat([d_gain, w.scale[:, None] * grad.shift], dim=1)
    return d_matrix, d_scale, w.scale * by_gain, w.scale * shift_by_gain


def _route(d_squares: Tensor, norm: _Norm) -> tuple[Tensor, Tensor]:
    """A floored row's norm is its floor: the gradient then belongs to the trace and the weight, not to the row."""
    zero = torch.zeros((), dtype=d_squares.dtype, device=d_squares.device)
    return torch.where(norm.live, d_squares, zero), torch.where(norm.live, zero, d_squares)
