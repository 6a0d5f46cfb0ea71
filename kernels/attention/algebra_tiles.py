"""Pieces that the fused algebra's kernels share: tiles of small matrices, their products, sums over vectors.

Every matrix is a pointer and two strides, so that a transpose costs nothing to say. Dots are IEEE fp32 (fp64 in the
interpreter): norms and attention come out of differences of Gram entries, which TF32 would spoil. No value that another
program of the same launch writes is ever read.
"""

import triton
import triton.language as tl

from kernels.attention.configs import SUM_BLOCK


@triton.jit
def gram_end(C, D):
    """Offset of `cross` in a sample's row (see algebra_state)."""
    return C * C + C * D + D * D + C + D


@triton.jit
def vectors_at(C, D):
    """Offset of the rows of C numbers."""
    return C * C + 3 * C * D + D * D + C + D


@triton.jit
def load_tile(ptr, o_row, o_col, ROWS, COLS, s_row, s_col):
    """Tile of a matrix [ROWS, COLS], zero outside."""
    mask = (o_row < ROWS)[:, None] & (o_col < COLS)[None, :]
    return tl.load(ptr + o_row[:, None] * s_row + o_col[None, :] * s_col, mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, value, o_row, o_col, ROWS, COLS, s_row):
    """Tile of a row-major matrix."""
    mask = (o_row < ROWS)[:, None] & (o_col < COLS)[None, :]
    tl.store(ptr + o_row[:, None] * s_row + o_col[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def product(acc, a, o_m, M, s_am, s_ak, b, o_n, N, s_bk, s_bn, K, weight, BLOCK_K: tl.constexpr):
    """acc + A diag(weight) B of tiles [BLOCK_M, BLOCK_N]; A [M, K], B [K, N], weight [K] or None."""
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_a = load_tile(a, o_m, o_k, M, K, s_am, s_ak)
        if weight is not None:
            b_a = b_a * tl.load(weight + o_k, mask=o_k < K, other=0.0)[None, :]
        b_b = load_tile(b, o_k, o_n, K, N, s_bk, s_bn)
        acc = tl.dot(b_a, b_b, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def rows_times(a, o_m, M, s_am, s_ak, v, w, K, BLOCK_M: tl.constexpr, ACC: tl.constexpr):
    """Rows of A [M, K] times the vector v ⊙ w [K] (w may be None)."""
    total = tl.zeros((BLOCK_M,), ACC)
    for k in range(0, K, 64):
        o_k = k + tl.arange(0, 64)
        m_k = o_k < K
        b_v = tl.load(v + o_k, mask=m_k, other=0.0)
        if w is not None:
            b_v *= tl.load(w + o_k, mask=m_k, other=0.0)
        total += tl.sum(load_tile(a, o_m, o_k, M, K, s_am, s_ak) * b_v[None, :], 1)
    return total


@triton.jit
def inner(a, b, K, ACC: tl.constexpr):
    """Σ a b over K numbers."""
    total = tl.zeros((128,), ACC)
    for k in range(0, K, 128):
        o_k = k + tl.arange(0, 128)
        total += tl.load(a + o_k, mask=o_k < K, other=0.0) * tl.load(b + o_k, mask=o_k < K, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def largest(a, K, ACC: tl.constexpr):
    """max |a| over K numbers."""
    found = tl.zeros((128,), ACC)
    for k in range(0, K, 128):
        o_k = k + tl.arange(0, 128)
        found = tl.maximum(found, tl.abs(tl.load(a + o_k, mask=o_k < K, other=0.0)))
    return tl.max(found, 0)


@triton.jit
def power_of_two(bound):
    """Unit by which a matrix whose entries stay within `bound` (fp32) is divided to fit fp16: the largest lands in
    [2^14, 2^15) at most. A bound may be loose by 2^14 before an entry as large as the largest loses a bit."""
    bits = bound.to(tl.int32, bitcast=True) & 0x7F800000
    usable = (bits >= 0x07800000) & (bits < 0x7F800000)  # from 2^-112: neither tiny, nor infinite, nor NaN
    bits = tl.where(usable, bits - (14 << 23), 0x3F800000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def one_over(unit):
    """Exact reciprocal of a power of two (fp32): Triton's `/` is approximate."""
    return (0x7F000000 - unit.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def sum_kernel(partial, out, SPLITS, SIZE, s_out, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """out[b] = Σ over splits of partial [B, SPLITS, SIZE], in a fixed order. Grid: (B, blocks of SIZE)."""
    pid_b = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    partial += pid_b * SPLITS * SIZE
    total = tl.zeros((ROWS, BLOCK), partial.dtype.element_ty)
    for first in range(0, SPLITS, ROWS):
        o_s = first + tl.arange(0, ROWS)
        mask = (o_s < SPLITS)[:, None] & (o < SIZE)[None, :]
        total += tl.load(partial + o_s[:, None].to(tl.int64) * SIZE + o[None, :], mask=mask, other=0.0)
    tl.store(out + pid_b * s_out + o, tl.sum(total, 0), mask=o < SIZE)


def sum_splits(partial, out) -> None:
    """out [B, SIZE] (rows may be further apart) = partial [B, splits, SIZE] summed over the splits, one launch."""
    B, splits, size = partial.shape
    grid = (B, triton.cdiv(size, SUM_BLOCK))
    sum_kernel[grid](partial, out, splits, size, out.stride(0), BLOCK=SUM_BLOCK, ROWS=8, num_warps=4)
