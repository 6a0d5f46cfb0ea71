"""How a Triton program samples a level at target pixels: the coordinates of F.interpolate, three ways to read.

Names: b_ block values, o_ offsets, m_ masks. Scales come from the host, divided exactly: Triton's own `/` is
approximate in float32 on a GPU, and a scale of one that is off by an ulp samples a level between its pixels.
"""

import triton
import triton.language as tl

# What WINDOW says of a level: its pixels are the target's; four taps a pixel; else the pixels of a window of its rows.
COPY = tl.constexpr(0)
TAPS = tl.constexpr(-1)
# Windows begin at a multiple of so many pixels: 16 bytes of a 16-bit type.
ALIGN = tl.constexpr(8)


@triton.jit
def widen(o, WIDE: tl.constexpr):
    """Offsets in 64 bits where a sample's extent needs them."""
    if WIDE:
        o = o.to(tl.int64)
    return o


@triton.jit
def source(o, scale, size, ACC: tl.constexpr):
    """F.interpolate(align_corners=False): lower index, upper index and the upper's weight of target positions o."""
    position = tl.maximum((o.to(ACC) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(position.to(tl.int32), size - 1)
    high = tl.minimum(low + 1, size - 1)
    return low, high, position - low.to(ACC)


@triton.jit
def weight_of(o, o_target, scale, size, ACC: tl.constexpr):
    """Weight with which targets o_target sampled source positions o along one axis: the adjoint of `source`."""
    low, high, b_high = source(o_target, scale, size, ACC)
    return tl.where(low == o, 1.0 - b_high, 0.0) + tl.where(high == o, b_high, 0.0)


@triton.jit
def first_reached(o, inverse, ACC: tl.constexpr):
    """A target at or at most one before the first that may sample source o; source 0 also serves all before it."""
    first = tl.floor((o.to(ACC) - 0.5) * inverse - 0.5).to(tl.int32)
    return tl.where(o == 0, 0, tl.maximum(first, 0))


@triton.jit
def window_start(x_first, scale, size, ACC: tl.constexpr):
    """First pixel of the window from which targets x_first and after are sampled."""
    start, _, _ = source(x_first, scale, size, ACC)
    return start // ALIGN * ALIGN


@triton.jit
def sample_row(
    ptr, sy, sx, o_y, x_first, o_x, m_x, h, w, scale_y, scale_x,
    WINDOW: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Samples [pixels o_x] of one channel along a part of target row o_y that begins at x_first; see sample_tile."""
    if WINDOW == COPY:
        o = widen(o_y, WIDE) * sy + widen(o_x, WIDE) * sx
        b_out = tl.load(ptr + o, mask=m_x, other=0.0).to(ACC)
    else:
        y0, y1, b_y = source(o_y, scale_y, h, ACC)
        x0, x1, b_x = source(o_x, scale_x, w, ACC)
        upper, lower = ptr + widen(y0, WIDE) * sy, ptr + widen(y1, WIDE) * sy
        if WINDOW == TAPS:
            o_0, o_1 = widen(x0, WIDE) * sx, widen(x1, WIDE) * sx
            b_out = (1.0 - b_y) * (1.0 - b_x) * tl.load(upper + o_0, mask=m_x, other=0.0).to(ACC)
            b_out += (1.0 - b_y) * b_x * tl.load(upper + o_1, mask=m_x, other=0.0).to(ACC)
            b_out += b_y * (1.0 - b_x) * tl.load(lower + o_0, mask=m_x, other=0.0).to(ACC)
            b_out += b_y * b_x * tl.load(lower + o_1, mask=m_x, other=0.0).to(ACC)
        else:
            start = window_start(x_first, scale_x, w, ACC)
            o_s = start + tl.arange(0, WINDOW)
            o = widen(o_s, WIDE) * sx
            b_row = (1.0 - b_y) * tl.load(upper + o, mask=o_s < w, other=0.0).to(ACC)
            b_row += b_y * tl.load(lower + o, mask=o_s < w, other=0.0).to(ACC)
            b_0, b_1 = tl.gather(b_row, inside(x0 - start, WINDOW), 0), tl.gather(b_row, inside(x1 - start, WINDOW), 0)
            b_out = (1.0 - b_x) * b_0 + b_x * b_1
    return b_out


@triton.jit
def sample_tile(
    ptr, o_d, m_d, sc, sy, sx, o_y, x_first, o_x, m_x, h, w, scale_y, scale_x,
    WINDOW: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Samples [channels o_d, pixels o_x] along a part of target row o_y that begins at x_first.

    A level of the target's size is copied. A window is read in whole rows (neighbouring pixels are neighbours in
    memory), blended along y, and its pixels are dealt out to the targets along x inside registers. Taps are for levels
    whose channels lie together.
    """
    rows = ptr + (widen(o_d, WIDE) * sc)[:, None]
    if WINDOW == COPY:
        o = widen(o_y, WIDE) * sy + (widen(o_x, WIDE) * sx)[None, :]
        b_out = tl.load(rows + o, mask=m_d[:, None] & m_x[None, :], other=0.0).to(ACC)
    else:
        y0, y1, b_y = source(o_y, scale_y, h, ACC)
        x0, x1, b_x = source(o_x, scale_x, w, ACC)
        upper, lower = rows + widen(y0, WIDE) * sy, rows + widen(y1, WIDE) * sy
        if WINDOW == TAPS:
            mask = m_d[:, None] & m_x[None, :]
            o_0, o_1 = (widen(x0, WIDE) * sx)[None, :], (widen(x1, WIDE) * sx)[None, :]
            b_0, b_1 = (1.0 - b_x)[None, :], b_x[None, :]
            b_out = (1.0 - b_y) * b_0 * tl.load(upper + o_0, mask=mask, other=0.0).to(ACC)
            b_out += (1.0 - b_y) * b_1 * tl.load(upper + o_1, mask=mask, other=0.0).to(ACC)
            b_out += b_y * b_0 * tl.load(lower + o_0, mask=mask, other=0.0).to(ACC)
            b_out += b_y * b_1 * tl.load(lower + o_1, mask=mask, other=0.0).to(ACC)
        else:
            start = window_start(x_first, scale_x, w, ACC)
            o_s = start + tl.arange(0, WINDOW)
            mask = m_d[:, None] & (o_s < w)[None, :]
            o = (widen(o_s, WIDE) * sx)[None, :]
            b_rows = (1.0 - b_y) * tl.load(upper + o, mask=mask, other=0.0).to(ACC)
            b_rows += b_y * tl.load(lower + o, mask=mask, other=0.0).to(ACC)
            b_0, b_1 = deal(b_rows, inside(x0 - start, WINDOW)), deal(b_rows, inside(x1 - start, WINDOW))
            b_out = (1.0 - b_x)[None, :] * b_0 + b_x[None, :] * b_1
    return b_out


@triton.jit
def inside(index, SIZE: tl.constexpr):
    """Indices of idle lanes brought into 0…SIZE − 1."""
    return tl.minimum(tl.maximum(index, 0), SIZE - 1)


@triton.jit
def deal(b_rows, index):
    """Column index[i] of every row of b_rows [channels, pixels]."""
    return tl.gather(b_rows, tl.broadcast_to(index[None, :], (b_rows.shape[0], index.shape[0])), 1)
