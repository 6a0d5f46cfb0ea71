"""Launch plans of the aggregation kernels from shapes and strides alone: tiles, windows, grids. Imports no triton."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kernels.runtime import INTERPRETING

# Elements of one program's tile over targets, over sources, and of one row's window.
TARGET_TILE, GRADIENT_TILE, WINDOW_TILE = 1024, 2048, 4096
COPY, TAPS = 0, -1  # as in sampling.py
ALIGN = 8


class Plan(NamedTuple):
    """grid; tuples with one entry a level, in the order of the kernel's arguments; compile-time constants."""

    grid: tuple[int, int]
    levels: tuple[tuple, ...]
    constants: dict[str, object]


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def needs_int64(maps: Sequence[Tensor]) -> bool:
    """Whether an element's offset inside one sample of a map [B, C, H, W] passes 2^31 − 1."""
    return any(sum((n - 1) * s for n, s in zip(m.shape[1:], m.stride()[1:], strict=True)) > 2**31 - 1 for m in maps)


def _sizes(levels: Sequence[Tensor], H: int, W: int) -> tuple[tuple, ...]:
    """Heights, widths and F.interpolate's scales; Triton rounds these exact quotients to float32 once."""
    h, w = tuple(v.shape[2] for v in levels), tuple(v.shape[3] for v in levels)
    return h, w, tuple(n / H for n in h), tuple(n / W for n in w)


def _strides(levels: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(level.stride()) for level in levels)


def _block_d(group: int) -> int:
    return min(16 if INTERPRETING else 32, power_of_2(group))


def _warps(elements: int, each: int = 8) -> int:
    """Warps of 32 threads with so many elements of a tile each: at least 128-bit loads of a 16-bit type."""
    return max(1, elements // (32 * each))


def window(level: Tensor, H: int, W: int, block_d: int, block_n: int) -> int:
    """How targets read a level: COPY, TAPS, or how many of its pixels a window holds along a row.

    Taps suit a level whose channels lie together, and one so much wider than the target that most pixels go unread.
    """
    h, w = level.shape[2:]
    if (h, w) == (H, W):
        return COPY
    if level.stride(1) == 1 and level.shape[1] > 1:
        return TAPS
    # Both neighbours of the first and of the last target, one pixel for rounding, and what precedes an aligned start.
    reached = (block_n - 1) * w // W + 4 + ALIGN - 1
    pixels = max(16, power_of_2(min(w, reached)))
    return pixels if pixels * block_d <= WINDOW_TILE else TAPS


def plan_target(values: Sequence[Tensor], logits: Sequence[Tensor], target: Tensor) -> Plan:
    """Programs over the target's rows: the forward pass, and the shares of the backward pass."""
    B, D, H, W = target.shape
    G = logits[0].shape[1]
    block_d = _block_d(D // G)
    block_n = max(16, min(TARGET_TILE // block_d, 128, power_of_2(W)))
    windows = tuple(window(v, H, W, block_d, block_n) for v in values)
    # Every warp repeats the work on pixels alone (positions, logits, shares), which a window has more of: half the
    # warps are then 0.39 of the instructions (sm_90, levels 128/64/32/16).
    each = 16 if max(windows) > 0 else 8
    constants = {
        "WINDOWS": windows,
        "LEVELS": len(values),
        "GROUP": D // G,
        "BLOCK_D": block_d,
        "BLOCK_N": block_n,
        "WIDE": needs_int64([target, *values, *logits]),
        "num_warps": _warps(block_d * block_n, each),
    }
    grid = B * H * -(-W // block_n) * G, -(-(D // G) // block_d)
    levels = tuple(values), tuple(logits), *_sizes(values, H, W), _strides(values), _strides(logits)
    return Plan(grid, levels, constants)


def reach(size: int, level: int) -> int:
    """Most targets along one axis that may sample one source pixel: two source steps, and rounding at both ends."""
    return min(size, -(-2 * size // level) + 2)


def part(w: int, W: int, block_t: int) -> int:
    """Sources of a row that one program takes: all, or as many as have their targets in one block of block_t."""
    # Targets of n sources: n·W/w and their reach, begun at an aligned one.
    fit = w if block_t >= W else (block_t - ALIGN - reach(W, w)) * w // W
    fit = max(1, min(fit, 128))
    return -(-w // -(-w // fit))


def plan_gradient(d_values: Sequence[Tensor], d_logits: Sequence[Tensor], dp: Tensor) -> Plan:
    """Programs over the rows of all levels, the coarsest first: each of its programs takes longest."""
    B, D, H, W = dp.shape
    G = d_logits[0].shape[1]
    block_d = _block_d(D // G)
    block_t = max(16, min(GRADIENT_TILE // block_d, 128, power_of_2(W)))
    sizes = [tuple(v.shape[2:]) for v in d_values]
    lengths = tuple(block_t if size == (H, W) else part(size[1], W, block_t) for size in sizes)
    programs = [B * h * -(-w // n) * G for (h, w), n in zip(sizes, lengths, strict=True)]
    order = sorted(range(len(sizes)), key=lambda i: sizes[i][0] * sizes[i][1])
    first, last = [0] * len(sizes), [0] * len(sizes)
    count = 0
    for i in order:
        first[i], last[i] = count, count + programs[i]
        count = last[i]
    heights, widths, scales_y, scales_x = _sizes(d_values, H, W)
    constants = {
        "BLOCKS_M": tuple(
            COPY if size == (H, W) else max(16, power_of_2(n)) for size, n in zip(sizes, lengths, strict=True)
        ),
        "LEVELS": len(sizes),
        "GROUP": D // G,
        "BLOCK_D": block_d,
        "BLOCK_T": block_t,
        "WIDE": needs_int64([dp, *d_values, *d_logits]),
        "num_warps": _warps(block_d * block_t),
    }
    levels = (
        *(tuple(d_values), tuple(d_logits), heights, widths, scales_y, scales_x),
        *(tuple(H / h for h in heights), tuple(W / w for w in widths)),
        *(tuple(reach(H, h) for h in heights), tuple(reach(W, w) for w in widths)),
        *(lengths, tuple(first), tuple(last), _strides(d_values), _strides(d_logits)),
    )
    return Plan((count, -(-(D // G) // block_d)), levels, constants)
