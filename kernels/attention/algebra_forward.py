"""The forward algebra of semantic attention in three launches: `algebra.modulation`, from Grams to coefficients.

    project   cross = W_q Γ S_zp + (W_q β) m_pᵀ, and the squared norms of query and key rows as sums of tiles
    attend    attended = softmax(τ q̄ k̄ᵀ) W_v, a head's rows at a time, without storing the map
    fold      gain and shift in the dtype, and for fp16 the units, that the pixel passes read

The state row of a sample (algebra_state.py) carries everything from launch to launch, and to the backward pass.
Names as in algebra.py; o_ offsets, m_ masks, b_ block values; S the length of a state row.
"""

import triton
import triton.language as tl

from kernels.attention import algebra_state as rows
from kernels.attention.algebra import ABSOLUTE_FLOOR, RELATIVE_FLOOR
from kernels.attention.algebra_tiles import (
    gram_end,
    largest,
    load_tile,
    one_over,
    power_of_two,
    product,
    rows_times,
    store_tile,
    vectors_at,
)

LSE = tl.constexpr(rows.LSE)
QUERY_INVERSE = tl.constexpr(rows.QUERY_INVERSE)
KEY_INVERSE = tl.constexpr(rows.KEY_INVERSE)
OFFSET = tl.constexpr(rows.OFFSET)
QUERY_SQUARE = tl.constexpr(rows.QUERY_SQUARE)
KEY_SQUARE = tl.constexpr(rows.KEY_SQUARE)
GAIN_BOUND = tl.constexpr(rows.GAIN_BOUND)
SHIFT_BOUND = tl.constexpr(rows.SHIFT_BOUND)
VALUE_BOUND = tl.constexpr(rows.VALUE_BOUND)
PROJECTION_BOUND = tl.constexpr(rows.PROJECTION_BOUND)
KEY_BOUND = tl.constexpr(rows.KEY_BOUND)
VECTORS = tl.constexpr(rows.VECTORS)
RELATIVE = tl.constexpr(RELATIVE_FLOOR)
ABSOLUTE = tl.constexpr(ABSOLUTE_FLOOR)


@triton.jit
def _row_sizes(a, o_m, M, K, weight, BLOCK_M: tl.constexpr, ACC: tl.constexpr):
    """Of the rows of a row-major A [M, K]: Σ a², Σ |a| and max |a · weight| (weight [K] or None)."""
    square, length, top = tl.zeros((BLOCK_M,), ACC), tl.zeros((BLOCK_M,), ACC), tl.zeros((BLOCK_M,), ACC)
    for k in range(0, K, 64):
        o_k = k + tl.arange(0, 64)
        b_a = tl.abs(load_tile(a, o_m, o_k, M, K, K, 1))
        square += tl.sum(b_a * b_a, 1)
        length += tl.sum(b_a, 1)
        if weight is not None:
            b_a *= tl.abs(tl.load(weight + o_k, mask=o_k < K, other=0.0))[None, :]
        top = tl.maximum(top, tl.max(b_a, 1))
    return square, length, top


@triton.jit
def _query_rows(zs, gamma, beta, query, out, scale, value, vectors, o_m, C, D, pixels,
                BLOCK_M: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """What a tile of query rows has but once: its vectors in the state, and 2 o (P m_z) + N o² of its squared norms."""
    m_m = o_m < C
    offset = rows_times(query, o_m, C, C, 1, beta, None, C, BLOCK_M, ACC)
    seen = rows_times(query, o_m, C, C, 1, gamma, zs, C, BLOCK_M, ACC)
    square, _, top = _row_sizes(query, o_m, C, C, gamma, BLOCK_M, ACC)
    tl.store(vectors + OFFSET * C + o_m, offset, mask=m_m)
    tl.store(vectors + QUERY_SQUARE * C + o_m, square, mask=m_m)
    tl.store(vectors + PROJECTION_BOUND * C + o_m, top, mask=m_m)
    _, of_gain, _ = _row_sizes(out, o_m, C, C, None, BLOCK_M, ACC)
    _, of_shift, _ = _row_sizes(out + C * C, o_m, C, C, None, BLOCK_M, ACC)
    _, _, top = _row_sizes(value, o_m, C, D, None, BLOCK_M, ACC)
    b_s = tl.abs(tl.load(scale + o_m, mask=m_m, other=0.0))
    b_gamma = tl.abs(tl.load(gamma + o_m, mask=m_m, other=0.0))
    b_beta = tl.abs(tl.load(beta + o_m, mask=m_m, other=0.0))
    tl.store(vectors + GAIN_BOUND * C + o_m, b_s * b_gamma * of_gain, mask=m_m)
    tl.store(vectors + SHIFT_BOUND * C + o_m, b_s * (b_beta * of_gain + of_shift), mask=m_m)
    tl.store(vectors + VALUE_BOUND * C + o_m, top, mask=m_m)
    return 2.0 * offset * seen + offset * offset * pixels


@triton.jit
def _traces(zz, pp, zs, s_zz, s_pp, gamma, beta, C, D, pixels, ACC: tl.constexpr):
    """tr S of x̂ (a quadratic form of γ and β) and of p."""
    of_x, of_p = tl.zeros((64,), ACC), tl.zeros((64,), ACC)
    for k in range(0, C, 64):
        o_k = k + tl.arange(0, 64)
        m_k = o_k < C
        b_gamma = tl.load(gamma + o_k, mask=m_k, other=0.0)
        b_beta = tl.load(beta + o_k, mask=m_k, other=0.0)
        of_x += tl.load(zz + o_k * (s_zz + 1), mask=m_k, other=0.0) * b_gamma * b_gamma
        of_x += 2.0 * tl.load(zs + o_k, mask=m_k, other=0.0) * b_gamma * b_beta + b_beta * b_beta * pixels
    for k in range(0, D, 64):
        o_k = k + tl.arange(0, 64)
        of_p += tl.load(pp + o_k * (s_pp + 1), mask=o_k < D, other=0.0)
    return tl.sum(of_x, 0), tl.sum(of_p, 0)


@triton.jit
def project_kernel(
    grams, state, squares, gamma, beta, query, key, value, out, scale, C, D, pixels, S,
    s_batch, s_zz, s_zp, s_pp, o_zp, o_pp, o_zs, o_ps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Tiles of P S_zz (squared norms only), P S_zp (cross) and W_k S_pp (squared norms only), P = W_q Γ.

    squares [B, column tiles of C and D, C]: parts of the query's, then of the key's squared norms. PACK: grams is the
    wide route's square matrix, whose moments are copied into the state. Grid: (B·row tiles of C, column tiles).
    """
    row_tiles = tl.cdiv(C, BLOCK_M)
    pid_b = (tl.program_id(0) // row_tiles).to(tl.int64)
    tile = tl.program_id(0) % row_tiles
    column = tl.program_id(1)
    tiles_c, tiles_d = tl.cdiv(C, BLOCK_N), tl.cdiv(D, BLOCK_N)
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < C
    zz = grams + pid_b * s_batch
    zp, pp, zs, ps = zz + o_zp, zz + o_pp, zz + o_zs, zz + o_ps
    state += pid_b * S
    squares += pid_b * (tiles_c + tiles_d) * C
    vectors = state + vectors_at(C, D)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if column < tiles_c:
        o_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = product(acc, query, o_m, C, C, 1, zz, o_n, C, s_zz, 1, C, gamma, BLOCK_K)
        b_p = load_tile(query, o_m, o_n, C, C, C, 1) * tl.load(gamma + o_n, mask=o_n < C, other=0.0)[None, :]
        part = tl.sum(acc * b_p, 1)
        if column == 0:
            part += _query_rows(zs, gamma, beta, query, out, scale, value, vectors, o_m, C, D, pixels, BLOCK_M, ACC)
            if tile == 0:
                of_x, of_p = _traces(zz, pp, zs, s_zz, s_pp, gamma, beta, C, D, pixels, ACC)
                tl.store(vectors + VECTORS * C, of_x)
                tl.store(vectors + VECTORS * C + 1, of_p)
        tl.store(squares + column * C + o_m, part, mask=m_m)
        if PACK:
            store_tile(state, load_tile(zz, o_m, o_n, C, C, s_zz, 1), o_m, o_n, C, C, C)
            if tile == 0:
                tl.store(state + gram_end(C, D) - C - D + o_n, tl.load(zs + o_n, mask=o_n < C, other=0.0), mask=o_n < C)
    elif column < tiles_c + tiles_d:
        o_n = (column - tiles_c) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < D
        acc = product(acc, query, o_m, C, C, 1, zp, o_n, D, s_zp, 1, C, gamma, BLOCK_K)
        offset = rows_times(query, o_m, C, C, 1, beta, None, C, BLOCK_M, ACC)
        b_ps = tl.load(ps + o_n, mask=m_n, other=0.0)
        acc += offset[:, None] * b_ps[None, :]
        store_tile(state + gram_end(C, D), acc, o_m, o_n, C, D, D)
        if PACK:
            store_tile(state + C * C, load_tile(zp, o_m, o_n, C, D, s_zp, 1), o_m, o_n, C, D, D)
            if tile == 0:
                tl.store(state + gram_end(C, D) - D + o_n, b_ps, mask=m_n)
    else:
        o_n = (column - tiles_c - tiles_d) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = product(acc, key, o_m, C, D, 1, pp, o_n, D, s_pp, 1, D, None, BLOCK_K)
        part = tl.sum(acc * load_tile(key, o_m, o_n, C, D, D, 1), 1)
        tl.store(squares + (column - tiles_d) * C + o_m, part, mask=m_m)
        if column == tiles_c + tiles_d:
            square, _, top = _row_sizes(key, o_m, C, D, None, BLOCK_M, ACC)
            tl.store(vectors + KEY_SQUARE * C + o_m, square, mask=m_m)
            tl.store(vectors + KEY_BOUND * C + o_m, top, mask=m_m)
        if PACK:
            for first in range(tile * BLOCK_M, D, row_tiles * BLOCK_M):
                o_d = first + tl.arange(0, BLOCK_M)
                b_pp = load_tile(pp, o_d, o_n, D, D, s_pp, 1)
                store_tile(state + C * C + C * D, b_pp, o_d, o_n, D, D, D)


@triton.jit
def _inverse_norm(squares, tiles, C, o, mask, weight_square, trace, pixels, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """1/‖row‖ after the floor of `algebra.row_norm`, negative where the floor was taken."""
    total = tl.zeros((BLOCK,), ACC)
    for tile in range(tiles):
        total += tl.load(squares + tile * C + o, mask=mask, other=0.0)
    floor = tl.load(weight_square + o, mask=mask, other=0.0) * RELATIVE * trace + pixels * ABSOLUTE
    inverse = 1.0 / tl.sqrt(tl.maximum(total, floor))
    return tl.where(total >= floor, inverse, -inverse)


@triton.jit
def attend_kernel(
    state, squares, key, value, temperature, C, D, head_width, pixels, S,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILE_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """attended = softmax over the head's rows j of τ q̄_i·k̄_j, times W_v. Grid: (B·heads·row tiles, tiles of D).

    The softmax runs over tiles of rows with a moving maximum; a program holds all of a row's logits only for narrow
    heads. TILE_N: the width of project_kernel's column tiles.
    """
    row_tiles = tl.cdiv(head_width, BLOCK_H)
    heads = C // head_width
    pid = tl.program_id(0) // row_tiles
    tile = tl.program_id(0) % row_tiles
    pid_b, head = (pid // heads).to(tl.int64), pid % heads
    first = head * head_width
    tiles_c, tiles_d = tl.cdiv(C, TILE_N), tl.cdiv(D, TILE_N)
    state += pid_b * S
    squares += pid_b * (tiles_c + tiles_d) * C + first
    vectors = state + vectors_at(C, D) + first
    trace_x = tl.load(state + vectors_at(C, D) + VECTORS * C)
    trace_p = tl.load(state + vectors_at(C, D) + VECTORS * C + 1)
    cross = state + gram_end(C, D) + first * D
    key += first * D
    value += first * D
    o_i = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_i = o_i < head_width
    b_tau = tl.load(temperature + head)
    inverse_i = _inverse_norm(squares, tiles_c, C, o_i, m_i, vectors + QUERY_SQUARE * C, trace_x, pixels, BLOCK_H, ACC)
    top = tl.full((BLOCK_H,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_H,), ACC)
    acc = tl.zeros((BLOCK_H, BLOCK_N), ACC)
    for j in range(0, head_width, BLOCK_H):
        o_j = j + tl.arange(0, BLOCK_H)
        m_j = o_j < head_width
        inverse_j = _inverse_norm(
            squares + tiles_c * C, tiles_d, C, o_j, m_j, vectors + KEY_SQUARE * C, trace_p, pixels, BLOCK_H, ACC
        )
        if (tile == 0) & (tl.program_id(1) == 0):
            tl.store(vectors + KEY_INVERSE * C + o_j, inverse_j, mask=m_j)
        raw = tl.zeros((BLOCK_H, BLOCK_H), ACC)
        raw = product(raw, cross, o_i, head_width, D, 1, key, o_j, head_width, 1, D, D, None, BLOCK_K)
        logit = b_tau * (raw * tl.abs(inverse_i)[:, None] * tl.abs(inverse_j)[None, :])
        logit = tl.where(m_j[None, :], logit, float("-inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        shrink = tl.exp(top - higher)
        weight = tl.exp(logit - higher[:, None])
        total = total * shrink + tl.sum(weight, 1)
        b_v = load_tile(value, o_j, o_n, head_width, D, D, 1)
        acc = tl.dot(weight, b_v, acc * shrink[:, None], input_precision="ieee", out_dtype=acc.dtype)
        top = higher
    acc = acc / total[:, None]
    store_tile(state + gram_end(C, D) + C * D + first * D, acc, o_i, o_n, head_width, D, D)
    if tl.program_id(1) == 0:
        tl.store(vectors + LSE * C + o_i, top + tl.log(total), mask=m_i)
        tl.store(vectors + QUERY_INVERSE * C + o_i, inverse_i, mask=m_i)


@triton.jit
def fold_tile(
    state, gamma, beta, out, scale, gain, shift, units, pid_b, tile, column, batch, C, D, S,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One tile of gain = s γ ⊙ W_g attended and shift = s β ⊙ W_g attended + s ⊙ W_b attended."""
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < C
    state += pid_b * S
    attended = state + gram_end(C, D) + C * D
    b_g, b_b = tl.zeros((BLOCK_M, BLOCK_N), ACC), tl.zeros((BLOCK_M, BLOCK_N), ACC)
    b_g = product(b_g, out, o_m, C, C, 1, attended, o_n, D, D, 1, C, None, BLOCK_K)
    b_b = product(b_b, out + C * C, o_m, C, C, 1, attended, o_n, D, D, 1, C, None, BLOCK_K)
    b_g = b_g * tl.load(scale + o_m, mask=m_m, other=0.0)[:, None]
    b_b = b_b * tl.load(scale + o_m, mask=m_m, other=0.0)[:, None]
    b_b += b_g * tl.load(beta + o_m, mask=m_m, other=0.0)[:, None]
    b_g = b_g * tl.load(gamma + o_m, mask=m_m, other=0.0)[:, None]
    if SCALED:
        # attended is an average of rows of W_v: the weights alone bound both matrices.
        vectors = state + vectors_at(C, D)
        top = largest(vectors + VALUE_BOUND * C, C, ACC)
        of_gain = power_of_two(top * largest(vectors + GAIN_BOUND * C, C, ACC))
        of_shift = power_of_two(top * largest(vectors + SHIFT_BOUND * C, C, ACC))
        b_g = b_g * one_over(of_gain)
        b_b = b_b * one_over(of_shift)
        if (tile == 0) & (column == 0):
            tl.store(units + pid_b, of_gain)
            tl.store(units + batch + pid_b, of_shift)
    store_tile(gain + pid_b * C * D, b_g, o_m, o_n, C, D, D)
    store_tile(shift + pid_b * C * D, b_b, o_m, o_n, C, D, D)


@triton.jit
def fold_kernel(
    state, gamma, beta, out, scale, gain, shift, units, batch, C, D, S,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Coefficients of the apply pass. Grid: (B·row tiles of C, tiles of D)."""
    row_tiles = tl.cdiv(C, BLOCK_M)
    pid_b = (tl.program_id(0) // row_tiles).to(tl.int64)
    fold_tile(
        state, gamma, beta, out, scale, gain, shift, units, pid_b, tl.program_id(0) % row_tiles, tl.program_id(1),
        batch, C, D, S, BLOCK_M, BLOCK_N, BLOCK_K, ACC, SCALED,
    )  # fmt: skip
