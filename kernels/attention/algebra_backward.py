"""First half of the algebra's backward pass: from gradients of gain and shift to those of the attention's operands.

    output_gradient   d_attended = W_oᵀ d_matrix, the coefficients again, and the gradients of W_o and s
    attend_gradient   through the softmax: d_cross of query rows, and what a sample gives the keys and values

Second half: algebra_gradients.py. Nothing is added atomically: a launch writes parts, a later one sums them in order.
Buffers: d_modulation [B, 2, C, D]; flow [B, 5 + tiles of D, C] vectors (see the constants); parts, the weights'
gradients of a group of samples [groups, 3C² + 2CD] = query, key, value, out; channels [·, 3, C] = scale, γ, β.
"""

import triton
import triton.language as tl

from kernels.attention.algebra_forward import KEY_INVERSE, LSE, QUERY_INVERSE, fold_tile
from kernels.attention.algebra_tiles import gram_end, load_tile, product, store_tile, vectors_at

# Rows of `flow`. A row's gradient of ‖row‖² belongs to the row itself (OWN) or, if floored, to trace and weight.
QUERY_OWN = tl.constexpr(0)
QUERY_FLOOR = tl.constexpr(1)
KEY_OWN = tl.constexpr(2)
KEY_FLOOR = tl.constexpr(3)
HEAT = tl.constexpr(4)  # Σ_j d_logit · cosine: the row's share of the gradient of τ
CROSS_BOUND = tl.constexpr(5)  # max |d_cross| of the row, one row of C for every tile of D


@triton.jit
def _attended_tile(
    d_modulation, state, gamma, beta, out, scale, d_attended, delta, pid_b, tile, column, C, D, S,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d_attended = W_gᵀ (s γ d_gain + s β d_shift) + W_bᵀ (s d_shift), and its share of ⟨d_attended, attended⟩."""
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    d_gain = d_modulation + pid_b * 2 * C * D
    d_shift = d_gain + C * D
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k in range(0, C, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < C
        b_s = tl.load(scale + o_k, mask=m_k, other=0.0)
        b_gamma = tl.load(gamma + o_k, mask=m_k, other=0.0)
        b_beta = tl.load(beta + o_k, mask=m_k, other=0.0)
        b_shift = load_tile(d_shift, o_k, o_n, C, D, D, 1) * b_s[:, None]
        b_gain = load_tile(d_gain, o_k, o_n, C, D, D, 1) * (b_s * b_gamma)[:, None] + b_shift * b_beta[:, None]
        b_w = load_tile(out, o_m, o_k, C, C, 1, C)
        acc = tl.dot(b_w, b_gain, acc, input_precision="ieee", out_dtype=acc.dtype)
        b_w = load_tile(out + C * C, o_m, o_k, C, C, 1, C)
        acc = tl.dot(b_w, b_shift, acc, input_precision="ieee", out_dtype=acc.dtype)
    store_tile(d_attended + pid_b * C * D, acc, o_m, o_n, C, D, D)
    attended = state + pid_b * S + gram_end(C, D) + C * D
    share = tl.sum(acc * load_tile(attended, o_m, o_n, C, D, D, 1), 1)
    tl.store(delta + (pid_b * tl.cdiv(D, BLOCK_N) + column) * C + o_m, share, mask=o_m < C)


@triton.jit
def _out_tile(
    d_modulation, state, gamma, beta, out, scale, parts, channels, group, groups, tile, column, batch, C, D, S,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile [C, C] of d_gain attendedᵀ and d_shift attendedᵀ over the group's samples: gradients of W_g, W_b, and,
    since gain and shift are linear in the rows of W_o, of s, γ and β as they stand in the folding."""
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < C
    b_g, b_b = tl.zeros((BLOCK_M, BLOCK_N), ACC), tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for b in range(group, batch, groups):
        pid_b = tl.full((), 0, tl.int64) + b
        d_gain = d_modulation + pid_b * 2 * C * D
        attended = state + pid_b * S + gram_end(C, D) + C * D
        b_g = product(b_g, d_gain, o_m, C, D, 1, attended, o_n, C, 1, D, D, None, BLOCK_K)
        b_b = product(b_b, d_gain + C * D, o_m, C, D, 1, attended, o_n, C, 1, D, D, None, BLOCK_K)
    b_s = tl.load(scale + o_m, mask=m_m, other=0.0)
    b_gamma = tl.load(gamma + o_m, mask=m_m, other=0.0)
    b_beta = tl.load(beta + o_m, mask=m_m, other=0.0)
    parts += group.to(tl.int64) * (3 * C * C + 2 * C * D) + C * C + 2 * C * D
    store_tile(parts, b_g * (b_s * b_gamma)[:, None] + b_b * (b_s * b_beta)[:, None], o_m, o_n, C, C, C)
    store_tile(parts + C * C, b_b * b_s[:, None], o_m, o_n, C, C, C)
    b_w = load_tile(out, o_m, o_n, C, C, C, 1)
    by_gain, by_shift = tl.sum(b_g * b_w, 1), tl.sum(b_b * b_w, 1)
    plain = tl.sum(b_b * load_tile(out + C * C, o_m, o_n, C, C, C, 1), 1)
    channels += (group * tl.cdiv(C, BLOCK_N) + column) * 3 * C
    tl.store(channels + o_m, b_gamma * by_gain + b_beta * by_shift + plain, mask=m_m)
    tl.store(channels + C + o_m, b_s * by_gain, mask=m_m)
    tl.store(channels + 2 * C + o_m, b_s * by_shift, mask=m_m)


@triton.jit
def output_gradient_kernel(
    d_modulation, state, gamma, beta, out, scale, d_attended, delta, gain, shift, units, parts, channels,
    batch, groups, C, D, S,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid: (groups·row tiles·column tiles of C for W_o, B·row tiles·tiles of D for d_attended, as many to fold,)."""
    pid = tl.program_id(0)
    row_tiles, tiles_c, tiles_d = tl.cdiv(C, BLOCK_M), tl.cdiv(C, BLOCK_N), tl.cdiv(D, BLOCK_N)
    of_out, of_maps = groups * row_tiles * tiles_c, batch * row_tiles * tiles_d
    if pid < of_out:
        _out_tile(
            d_modulation, state, gamma, beta, out, scale, parts, channels, pid // (row_tiles * tiles_c), groups,
            pid // tiles_c % row_tiles, pid % tiles_c, batch, C, D, S, BLOCK_M, BLOCK_N, BLOCK_K, ACC,
        )  # fmt: skip
    else:
        pid = pid - of_out
        column, tile = pid % tiles_d, pid // tiles_d % row_tiles
        if pid < of_maps:
            pid_b = (pid // (row_tiles * tiles_d)).to(tl.int64)
            _attended_tile(
                d_modulation, state, gamma, beta, out, scale, d_attended, delta, pid_b, tile, column, C, D, S,
                BLOCK_M, BLOCK_N, BLOCK_K, ACC,
            )  # fmt: skip
        else:
            pid_b = ((pid - of_maps) // (row_tiles * tiles_d)).to(tl.int64)
            fold_tile(
                state, gamma, beta, out, scale, gain, shift, units, pid_b, tile, column, batch, C, D, S,
                BLOCK_M, BLOCK_N, BLOCK_K, ACC, SCALED,
            )  # fmt: skip


@triton.jit
def attend_gradient_kernel(
    state, key, value, temperature, d_attended, delta, flow, d_cross, by_key, by_value, C, D, head_width, S,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILE_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Query rows i (side 0) and key rows j (side 1) of the attention map's gradient, which is never stored.

    d_logit = A ⊙ (d_attended W_vᵀ − δ), d_raw = τ d_logit ‖q_i‖⁻¹ ‖k_j‖⁻¹. Side 0: d_cross = d_raw W_k. Side 1, of
    this sample: by_key = d_rawᵀ cross, by_value = Aᵀ d_attended. Both sides are one computation with its operands
    swapped. Grid: (B·heads·row tiles, tiles of D, 2). TILE_N: the width of delta's tiles.
    """
    row_tiles = tl.cdiv(head_width, BLOCK_H)
    heads = C // head_width
    pid = tl.program_id(0) // row_tiles
    column, side = tl.program_id(1), tl.program_id(2)
    pid_b, head = (pid // heads).to(tl.int64), pid % heads
    first = head * head_width
    tiles_d = tl.cdiv(D, TILE_N)
    own = pid_b * C * D + first * D
    vectors = state + pid_b * S + vectors_at(C, D) + first
    cross = state + pid_b * S + gram_end(C, D) + first * D
    delta += pid_b * tiles_d * C + first
    flow += pid_b * (CROSS_BOUND + tl.cdiv(D, BLOCK_N)) * C + first
    key += first * D
    value += first * D
    d_attended += own
    if side == 0:
        x_raw, x_map, y_raw, y_map = cross, d_attended, key, value
    else:
        x_raw, x_map, y_raw, y_map = key, value, cross, d_attended
    o_x = (tl.program_id(0) % row_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m_x = o_x < head_width
    rows = m_x & (side == 0)  # x's rows are the map's rows; on side 1 its columns, and lse and δ belong to y
    b_tau = tl.load(temperature + head)
    signed = tl.load(vectors + (QUERY_INVERSE + side * (KEY_INVERSE - QUERY_INVERSE)) * C + o_x, mask=m_x, other=0.0)
    lse_x = tl.load(vectors + LSE * C + o_x, mask=rows, other=0.0)
    delta_x = tl.zeros((BLOCK_H,), ACC)
    for part in range(tiles_d):
        delta_x += tl.load(delta + part * C + o_x, mask=rows, other=0.0)
    heat = tl.zeros((BLOCK_H,), ACC)
    b_raw = tl.zeros((BLOCK_H, BLOCK_N), ACC)
    b_map = tl.zeros((BLOCK_H, BLOCK_N), ACC)
    for y in range(0, head_width, BLOCK_H):
        o_y = y + tl.arange(0, BLOCK_H)
        m_y = o_y < head_width
        m_map = m_y & (side == 1)
        inverse = tl.load(vectors + (KEY_INVERSE + side * (QUERY_INVERSE - KEY_INVERSE)) * C + o_y, mask=m_y, other=0.0)
        lse_y = tl.load(vectors + LSE * C + o_y, mask=m_map, other=0.0)
        delta_y = tl.zeros((BLOCK_H,), ACC)
        for part in range(tiles_d):
            delta_y += tl.load(delta + part * C + o_y, mask=m_map, other=0.0)
        scale = tl.abs(signed)[:, None] * tl.abs(inverse)[None, :]
        cosine = tl.zeros((BLOCK_H, BLOCK_H), ACC)
        cosine = product(cosine, x_raw, o_x, head_width, D, 1, y_raw, o_y, head_width, 1, D, D, None, BLOCK_K) * scale
        grad = tl.zeros((BLOCK_H, BLOCK_H), ACC)
        grad = product(grad, x_map, o_x, head_width, D, 1, y_map, o_y, head_width, 1, D, D, None, BLOCK_K)
        weight = tl.exp(b_tau * cosine - lse_x[:, None] - lse_y[None, :])
        weight = tl.where(m_x[:, None] & m_y[None, :], weight, 0.0)
        grad = weight * (grad - delta_x[:, None] - delta_y[None, :])
        heat += tl.sum(grad * cosine, 1)
        b_y = load_tile(y_raw, o_y, o_n, head_width, D, D, 1)
        b_raw = tl.dot(b_tau * grad * scale, b_y, b_raw, input_precision="ieee", out_dtype=ACC)
        b_y = load_tile(y_map, o_y, o_n, head_width, D, D, 1)
        b_map = tl.dot(weight, b_y, b_map, input_precision="ieee", out_dtype=ACC)
    if side == 0:
        store_tile(d_cross + own, b_raw, o_x, o_n, head_width, D, D)
        tl.store(flow + (CROSS_BOUND + column) * C + o_x, tl.max(tl.abs(b_raw), 1), mask=m_x)
    else:
        store_tile(by_key + own, b_raw, o_x, o_n, head_width, D, D)
        store_tile(by_value + own, b_map, o_x, o_n, head_width, D, D)
    if column == 0:
        d_square = -0.5 * b_tau * heat * signed * signed
        flow += side * (KEY_OWN - QUERY_OWN) * C
        tl.store(flow + QUERY_OWN * C + o_x, tl.where(signed > 0, d_square, 0.0), mask=m_x)
        tl.store(flow + QUERY_FLOOR * C + o_x, tl.where(signed > 0, 0.0, d_square), mask=m_x)
        tl.store(flow + HEAT * C + o_x, heat, mask=rows)
