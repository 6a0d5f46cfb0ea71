"""Second half of the algebra's backward pass: gradients of the Grams, as the gradient passes read them, and of weights.

    input_gradient    coefficients of the gradient passes (d_zp, 2 d_zz, 2 d_pp, d_z, d_p) a sample, and the gradients
                      of W_q, W_k, W_v of a group of samples
    weight_gradient   sums of all parts: the eight weights' gradients

The gradients of γ and β need no sum over W_q's rows of their own: with u = W_qᵀ d_cross and v = W_qᵀ diag(own) P, which
d_zp = γ ⊙ u and d_zz = γ ⊙ v pass through, they are sums over rows of u ⊙ S_zp, v ⊙ S_zz, u m_p and v m_z.
"""

import triton
import triton.language as tl

from kernels.attention.algebra_backward import CROSS_BOUND, HEAT, KEY_FLOOR, KEY_OWN, QUERY_FLOOR, QUERY_OWN
from kernels.attention.algebra_forward import (
    KEY_BOUND,
    KEY_SQUARE,
    OFFSET,
    PROJECTION_BOUND,
    QUERY_SQUARE,
    RELATIVE,
    VECTORS,
)
from kernels.attention.algebra_tiles import (
    gram_end,
    inner,
    largest,
    load_tile,
    one_over,
    power_of_two,
    product,
    rows_times,
    store_tile,
    vectors_at,
)


@triton.jit
def _weighted_squares(weight, bound, K, ACC: tl.constexpr):
    """Σ |weight| bound²: no entry of Aᵀ diag(weight) A is larger, bound being the largest of each row of A."""
    total = tl.zeros((128,), ACC)
    for k in range(0, K, 128):
        o_k = k + tl.arange(0, 128)
        b_b = tl.load(bound + o_k, mask=o_k < K, other=0.0)
        total += tl.abs(tl.load(weight + o_k, mask=o_k < K, other=0.0)) * b_b * b_b
    return tl.sum(total, 0)


@triton.jit
def _store_scaled(ptr, value, bound, unit, first, o_m, o_n, M, N, SCALED: tl.constexpr):
    """A tile in the passes' dtype; for fp16 divided by the unit that `bound` allows, which the first tile stores."""
    if SCALED:
        b_unit = power_of_two(bound)
        value = value * one_over(b_unit)
        if first:
            tl.store(unit, b_unit)
    store_tile(ptr, value, o_m, o_n, M, N, N)


@triton.jit
def _zz_tile(
    state, flow, gamma, beta, query, channels, hzz, dzs, unit, tile, column, C, D, pixels,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """hzz = 2 γ ⊙ v + diag(2 d_trace γ²), v = W_qᵀ diag(own) W_q Γ; a column's first tile also writes d_z."""
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < C, o_n < C
    vectors = state + vectors_at(C, D)
    zs = state + gram_end(C, D) - C - D
    own = flow + QUERY_OWN * C
    v = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    v = product(v, query, o_m, C, 1, C, query, o_n, C, C, 1, C, own, BLOCK_K)
    v = v * tl.load(gamma + o_n, mask=m_n, other=0.0)[None, :]
    d_gamma = 2.0 * tl.sum(v * load_tile(state, o_m, o_n, C, C, C, 1), 1)
    d_beta = 2.0 * tl.sum(v * tl.load(zs + o_n, mask=m_n, other=0.0)[None, :], 1)
    d_trace = inner(flow + QUERY_FLOOR * C, vectors + QUERY_SQUARE * C, C, ACC) * RELATIVE
    b_gamma = tl.load(gamma + o_m, mask=m_m, other=0.0)
    if column == 0:
        b_beta = tl.load(beta + o_m, mask=m_m, other=0.0)
        b_z = tl.load(zs + o_m, mask=m_m, other=0.0)
        b_zz = tl.load(state + o_m * (C + 1), mask=m_m, other=0.0)
        w = rows_times(query, o_m, C, 1, C, own, vectors + OFFSET * C, C, BLOCK_M, ACC)
        d_gamma += 2.0 * b_z * w + 2.0 * d_trace * (b_gamma * b_zz + b_beta * b_z)
        d_beta += 2.0 * pixels * (w + d_trace * b_beta) + 2.0 * d_trace * b_gamma * b_z
        tl.store(dzs + o_m, 2.0 * b_gamma * (w + d_trace * b_beta), mask=m_m)
    tl.store(channels + o_m, tl.zeros((BLOCK_M,), ACC), mask=m_m)
    tl.store(channels + C + o_m, d_gamma, mask=m_m)
    tl.store(channels + 2 * C + o_m, d_beta, mask=m_m)
    diagonal = tl.where(o_m[:, None] == o_n[None, :], (2.0 * d_trace * b_gamma * b_gamma)[:, None], 0.0)
    bound = tl.zeros((), ACC)
    if SCALED:
        top = largest(gamma, C, ACC)
        bound = 2.0 * (_weighted_squares(own, vectors + PROJECTION_BOUND * C, C, ACC) + tl.abs(d_trace) * top * top)
    _store_scaled(
        hzz, 2.0 * v * b_gamma[:, None] + diagonal, bound, unit, (tile == 0) & (column == 0), o_m, o_n, C, C, SCALED
    )


@triton.jit
def _zp_tile(
    state, flow, gamma, query, d_cross, channels, cross, unit, tile, column, C, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """d_zp = γ ⊙ u, u = W_qᵀ d_cross."""
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < C
    u = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    u = product(u, query, o_m, C, 1, C, d_cross, o_n, D, D, 1, C, None, BLOCK_K)
    b_ps = tl.load(state + gram_end(C, D) - D + o_n, mask=o_n < D, other=0.0)
    tl.store(channels + o_m, tl.zeros((BLOCK_M,), ACC), mask=m_m)
    tl.store(channels + C + o_m, tl.sum(u * load_tile(state + C * C, o_m, o_n, C, D, D, 1), 1), mask=m_m)
    tl.store(channels + 2 * C + o_m, tl.sum(u * b_ps[None, :], 1), mask=m_m)
    bound = tl.zeros((), ACC)
    if SCALED:
        for part in range(tl.cdiv(D, BLOCK_N)):
            bound += inner(state + vectors_at(C, D) + PROJECTION_BOUND * C, flow + (CROSS_BOUND + part) * C, C, ACC)
    u = u * tl.load(gamma + o_m, mask=m_m, other=0.0)[:, None]
    _store_scaled(cross, u, bound, unit, (tile == 0) & (column == 0), o_m, o_n, C, D, SCALED)


@triton.jit
def _pp_tile(
    state, flow, key, d_cross, hpp, dps, unit, tile, column, C, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """hpp = 2 W_kᵀ diag(own) W_k + diag(2 d_trace); a column's first tile also writes d_p = d_crossᵀ W_q β."""
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    vectors = state + vectors_at(C, D)
    own = flow + KEY_OWN * C
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = product(acc, key, o_m, D, 1, D, key, o_n, D, D, 1, C, own, BLOCK_K)
    d_trace = inner(flow + KEY_FLOOR * C, vectors + KEY_SQUARE * C, C, ACC) * RELATIVE
    if column == 0:
        b_ps = rows_times(d_cross, o_m, D, 1, D, vectors + OFFSET * C, None, C, BLOCK_M, ACC)
        tl.store(dps + o_m, b_ps, mask=o_m < D)
    bound = tl.zeros((), ACC)
    if SCALED:
        bound = 2.0 * (_weighted_squares(own, vectors + KEY_BOUND * C, C, ACC) + tl.abs(d_trace))
    acc = 2.0 * (acc + tl.where(o_m[:, None] == o_n[None, :], d_trace, 0.0))
    _store_scaled(hpp, acc, bound, unit, (tile == 0) & (column == 0), o_m, o_n, D, D, SCALED)


@triton.jit
def _query_tile(
    state, flow, gamma, beta, query, d_cross, parts, group, groups, tile, column, batch, C, D, pixels, S, s_flow,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of W_q: d_P γ + d_offset βᵀ and the floors' share, d_P = Σ d_cross S_zpᵀ + 2 own (P S_zz + o m_zᵀ)."""
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < C, o_n < C
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for b in range(group, batch, groups):
        pid_b = tl.full((), 0, tl.int64) + b
        row = state + pid_b * S
        b_zz = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        b_zz = product(b_zz, query, o_m, C, C, 1, row, o_n, C, C, 1, C, gamma, BLOCK_K)
        offset = tl.load(row + vectors_at(C, D) + OFFSET * C + o_m, mask=m_m, other=0.0)
        b_zz += offset[:, None] * tl.load(row + gram_end(C, D) - C - D + o_n, mask=m_n, other=0.0)[None, :]
        own = tl.load(flow + pid_b * s_flow + QUERY_OWN * C + o_m, mask=m_m, other=0.0)
        acc += 2.0 * own[:, None] * b_zz
        acc = product(acc, d_cross + pid_b * C * D, o_m, C, D, 1, row + C * C, o_n, C, 1, D, D, None, BLOCK_K)
    # A loop of its own for what a row has but once: fewer registers live beside the products.
    d_offset, d_square = tl.zeros((BLOCK_M,), ACC), tl.zeros((BLOCK_M,), ACC)
    for b in range(group, batch, groups):
        pid_b = tl.full((), 0, tl.int64) + b
        row = state + pid_b * S
        zs = row + gram_end(C, D) - C - D
        d_offset += rows_times(d_cross + pid_b * C * D, o_m, C, D, 1, zs + C, None, D, BLOCK_M, ACC)
        seen = rows_times(query, o_m, C, C, 1, gamma, zs, C, BLOCK_M, ACC)
        offset = tl.load(row + vectors_at(C, D) + OFFSET * C + o_m, mask=m_m, other=0.0)
        own = tl.load(flow + pid_b * s_flow + QUERY_OWN * C + o_m, mask=m_m, other=0.0)
        d_offset += 2.0 * own * (seen + pixels * offset)
        floor = tl.load(flow + pid_b * s_flow + QUERY_FLOOR * C + o_m, mask=m_m, other=0.0)
        d_square += floor * tl.load(row + vectors_at(C, D) + VECTORS * C)
    acc = acc * tl.load(gamma + o_n, mask=m_n, other=0.0)[None, :]
    acc += d_offset[:, None] * tl.load(beta + o_n, mask=m_n, other=0.0)[None, :]
    acc += (d_square * (2.0 * RELATIVE))[:, None] * load_tile(query, o_m, o_n, C, C, C, 1)
    store_tile(parts + group.to(tl.int64) * (3 * C * C + 2 * C * D), acc, o_m, o_n, C, C, C)


@triton.jit
def _key_tile(
    state, flow, key, by_key, by_value, parts, group, groups, tile, column, batch, C, D, S, s_flow,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of W_k = Σ d_rawᵀ cross + 2 own W_k S_pp and the floors' share, and of W_v = Σ Aᵀ d_attended."""
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < C
    d_key, d_value = tl.zeros((BLOCK_M, BLOCK_N), ACC), tl.zeros((BLOCK_M, BLOCK_N), ACC)
    d_square = tl.zeros((BLOCK_M,), ACC)
    for b in range(group, batch, groups):
        pid_b = tl.full((), 0, tl.int64) + b
        row = state + pid_b * S
        own = tl.load(flow + pid_b * s_flow + KEY_OWN * C + o_m, mask=m_m, other=0.0)
        floor = tl.load(flow + pid_b * s_flow + KEY_FLOOR * C + o_m, mask=m_m, other=0.0)
        b_pp = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        b_pp = product(b_pp, key, o_m, C, D, 1, row + C * C + C * D, o_n, D, D, 1, D, None, BLOCK_K)
        d_key += load_tile(by_key + pid_b * C * D, o_m, o_n, C, D, D, 1) + 2.0 * own[:, None] * b_pp
        d_value += load_tile(by_value + pid_b * C * D, o_m, o_n, C, D, D, 1)
        d_square += floor * tl.load(row + vectors_at(C, D) + VECTORS * C + 1)
    d_key += (d_square * (2.0 * RELATIVE))[:, None] * load_tile(key, o_m, o_n, C, D, D, 1)
    parts += group.to(tl.int64) * (3 * C * C + 2 * C * D) + C * C
    store_tile(parts, d_key, o_m, o_n, C, D, D)
    store_tile(parts + C * D, d_value, o_m, o_n, C, D, D)


@triton.jit
def input_gradient_kernel(
    state, flow, gamma, beta, query, key, d_cross, by_key, by_value, cross, hzz, hpp, dzs, dps, units, parts, channels,
    batch, groups, C, D, pixels, S, s_flow,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid, one axis: groups·row tiles·(tiles of C for W_q, then of D for W_k and W_v), B·row tiles·(tiles of C for zz,
    then of D for zp), B·row tiles of D·tiles of D for pp."""
    pid = tl.program_id(0)
    row_tiles, tiles_c, tiles_d = tl.cdiv(C, BLOCK_M), tl.cdiv(C, BLOCK_N), tl.cdiv(D, BLOCK_N)
    tiles = tiles_c + tiles_d
    of_weights, of_maps = groups * row_tiles * tiles, batch * row_tiles * tiles
    if pid < of_weights:
        column, tile, group = pid % tiles, pid // tiles % row_tiles, pid // (tiles * row_tiles)
        if column < tiles_c:
            _query_tile(
                state, flow, gamma, beta, query, d_cross, parts, group, groups, tile, column, batch, C, D, pixels, S,
                s_flow, BLOCK_M, BLOCK_N, BLOCK_K, ACC,
            )  # fmt: skip
        else:
            _key_tile(
                state, flow, key, by_key, by_value, parts, group, groups, tile, column - tiles_c, batch, C, D, S,
                s_flow, BLOCK_M, BLOCK_N, BLOCK_K, ACC,
            )  # fmt: skip
    elif pid < of_weights + of_maps:
        pid = pid - of_weights
        column, tile, pid_b = pid % tiles, pid // tiles % row_tiles, (pid // (tiles * row_tiles)).to(tl.int64)
        state += pid_b * S
        flow += pid_b * s_flow
        channels += (groups * tiles_c + pid_b * tiles + column) * 3 * C
        if column < tiles_c:
            _zz_tile(
                state, flow, gamma, beta, query, channels, hzz + pid_b * C * C, dzs + pid_b * C,
                units + 3 * batch + pid_b, tile, column, C, D, pixels, BLOCK_M, BLOCK_N, BLOCK_K, ACC, SCALED,
            )  # fmt: skip
        else:
            _zp_tile(
                state, flow, gamma, query, d_cross + pid_b * C * D, channels, cross + pid_b * C * D,
                units + 2 * batch + pid_b, tile, column - tiles_c, C, D, BLOCK_M, BLOCK_N, BLOCK_K, ACC, SCALED,
            )  # fmt: skip
    else:
        pid = pid - of_weights - of_maps
        row_tiles_d = tl.cdiv(D, BLOCK_M)
        pid_b = (pid // (tiles_d * row_tiles_d)).to(tl.int64)
        _pp_tile(
            state + pid_b * S, flow + pid_b * s_flow, key, d_cross + pid_b * C * D, hpp + pid_b * D * D,
            dps + pid_b * D, units + 4 * batch + pid_b, pid // tiles_d % row_tiles_d, pid % tiles_d, C, D,
            BLOCK_M, BLOCK_N, BLOCK_K, ACC, SCALED,
        )  # fmt: skip


@triton.jit
def weight_gradient_kernel(
    parts, channels, flow, d_gamma, d_beta, d_query, d_key, d_value, d_temperature, d_out, d_scale,
    batch, groups, layers, C, D, head_width, s_flow, BLOCK: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of the parts in a fixed order. Grid: (blocks of 3C² + 2CD, blocks of 3C, heads,)."""
    pid = tl.program_id(0)
    size = 3 * C * C + 2 * C * D
    of_matrices, of_vectors = tl.cdiv(size, BLOCK), tl.cdiv(3 * C, BLOCK)
    if pid < of_matrices:
        o = pid * BLOCK + tl.arange(0, BLOCK)
        total = _sum_rows(parts, groups, size, o, BLOCK, ROWS, ACC)
        tl.store(d_query + o, total, mask=o < C * C)
        o -= C * C
        tl.store(d_key + o, total, mask=(o >= 0) & (o < C * D))
        o -= C * D
        tl.store(d_value + o, total, mask=(o >= 0) & (o < C * D))
        o -= C * D
        tl.store(d_out + o, total, mask=(o >= 0) & (o < 2 * C * C))
    elif pid < of_matrices + of_vectors:
        o = (pid - of_matrices) * BLOCK + tl.arange(0, BLOCK)
        total = _sum_rows(channels, layers, 3 * C, o, BLOCK, ROWS, ACC)
        tl.store(d_scale + o, total, mask=o < C)
        o -= C
        tl.store(d_gamma + o, total, mask=(o >= 0) & (o < C))
        o -= C
        tl.store(d_beta + o, total, mask=(o >= 0) & (o < C))
    else:
        head = pid - of_matrices - of_vectors
        total = tl.zeros((BLOCK,), ACC)
        for b in range(batch):
            heat = flow + (tl.full((), 0, tl.int64) + b) * s_flow + HEAT * C + head * head_width
            for first in range(0, head_width, BLOCK):
                o = first + tl.arange(0, BLOCK)
                total += tl.load(heat + o, mask=o < head_width, other=0.0)
        tl.store(d_temperature + head, tl.sum(total, 0))


@triton.jit
def _sum_rows(parts, count, size, o, BLOCK: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """Columns o of [count, size], summed over the rows."""
    total = tl.zeros((ROWS, BLOCK), ACC)
    for first in range(0, count, ROWS):
        o_r = first + tl.arange(0, ROWS)
        mask = (o_r < count)[:, None] & (o < size)[None, :]
        total += tl.load(parts + o_r[:, None].to(tl.int64) * size + o[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)
