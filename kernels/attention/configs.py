"""Launch configurations of semantic attention, keyed by width, dtype and architecture: never by H·W or batch.

Tiles and warps were chosen from ahead-of-time compilation (no spill, shared memory within every target's budget,
registers that leave two blocks a multiprocessor where the sums allow it), not yet from timings: see README.md. One rule
is from a GPU (H200, Triton 3.6): with tiles of 16 and 32 px the 2-byte gram and gradient kernels gave wrong gradients,
raced or died on Hopper, and at 64 px and more were right in every case tried, and faster; so they have 64 there.
"""

import torch

from kernels.runtime import INTERPRETING, target_architecture

TILED = ("apply", "reduce", "feature_gradient", "prior_gradient")

# (kernel, bytes an element) → {widest padded channel count: (BLOCK_N, warps)}. Where a fused kernel has no row for a
# width, the wide route takes over: Grams by the vendor's GEMM, gradients by tiles.
GENERAL = {
    ("gram", 2): {64: (64, 8), 128: (64, 8)},
    ("gram", 4): {64: (16, 8)},
    ("normalise", 2): {256: (64, 8), 512: (32, 8)},
    ("normalise", 4): {256: (32, 8), 512: (16, 8)},
    ("apply", 2): {64: (64, 4), 512: (64, 8)},
    ("apply", 4): {512: (16, 8)},
    ("reduce", 2): {64: (64, 8), 512: (64, 8)},
    ("reduce", 4): {512: (16, 8)},
    ("gradient", 2): {64: (64, 8), 128: (64, 8)},
    ("gradient", 4): {},
    ("feature_gradient", 2): {512: (64, 8)},
    ("feature_gradient", 4): {512: (16, 8)},
    ("norm_gradient", 2): {256: (32, 8), 512: (16, 8)},
    ("norm_gradient", 4): {256: (32, 8), 512: (16, 8)},
    ("prior_gradient", 2): {512: (32, 8)},
    ("prior_gradient", 4): {512: (16, 8)},
}
# Where a target differs: Ampere keeps operands in registers, gfx942 has less shared memory and wider waves.
BY_ARCHITECTURE: dict[int | str, dict[tuple[str, int], dict[int, tuple[int, int]]]] = {
    80: {
        ("gram", 2): {64: (16, 4), 128: (16, 8)},
        ("gradient", 2): {64: (32, 4), 128: (16, 8)},
    },
    100: {("gram", 2): {64: (32, 8), 128: (64, 8)}},
    "gfx942": {
        ("reduce", 2): {64: (64, 4), 512: (32, 8)},
        ("gram", 4): {64: (16, 4)},
        ("gram", 2): {64: (32, 4), 128: (32, 8)},
        ("gradient", 2): {64: (64, 8), 128: (16, 8)},
    },
}

# (C, D, dtype) that take the wide route whatever their width: `kernels.routes.use` puts them here.
TILED_GROUPS: set[tuple[int, int, torch.dtype]] = set()


def tile_width(channels: int) -> int:
    """Power of two that holds the channels, at least the 16 of a matrix instruction."""
    return max(16, 1 << (channels - 1).bit_length())


def _rows(kernel: str, dtype: torch.dtype) -> dict[int, tuple[int, int]]:
    architecture = target_architecture()
    if isinstance(architecture, int) and 80 < architecture < 90:
        architecture = 80
    key = (kernel, min(dtype.itemsize, 4))
    return BY_ARCHITECTURE.get(architecture, {}).get(key, GENERAL[key])


def fused(kernel: str, channels: int, prior_channels: int, dtype: torch.dtype) -> bool:
    """Whether one program of this kernel can hold all channels of a pixel, so that x and p are read once."""
    if (channels, prior_channels, dtype) in TILED_GROUPS:
        return False
    width = max(tile_width(channels), tile_width(prior_channels))
    if INTERPRETING:
        return width <= 128
    return width <= max(_rows(kernel, dtype), default=0)


def launch_config(kernel: str, channels: int, prior_channels: int, dtype: torch.dtype) -> dict[str, int]:
    """BLOCK sizes and warps of one kernel for C and D channels."""
    width = max(tile_width(channels), tile_width(prior_channels))
    if INTERPRETING:  # small tiles, so that small tests cross their borders
        config = {"BLOCK_N": 16}
    else:
        rows = _rows(kernel, dtype)
        pixels, warps = next(rows[widest] for widest in sorted(rows) if width <= widest)
        config = {"BLOCK_N": pixels, "num_warps": warps}
    if kernel in TILED:
        narrow = dtype.itemsize == 2 or INTERPRETING
        widest = 128 if kernel in ("apply", "reduce") and narrow else 64
        if kernel == "prior_gradient" and not narrow:
            widest = 32
        config |= {"BLOCK_C": min(tile_width(channels), widest), "BLOCK_D": min(tile_width(prior_channels), 64)}
    return config


# Numbers that a program of a plain sum takes at once.
SUM_BLOCK = 8192 if INTERPRETING else 256
# The small algebra, fp32 dots of FMA loops: widest of C and D → (BLOCK_M, BLOCK_N, BLOCK_K, warps). Chosen from
# ahead-of-time compilation (registers, no spill) and for programs enough to fill a GPU at a batch of 8.
ALGEBRA = {64: (16, 32, 16, 2), 512: (32, 64, 16, 4)}


def most_registers() -> dict[str, int]:
    """Lets ptxas use every register: in a kernel of several parts it else aims at a round 128 or 168, and spills."""
    on_cuda = not INTERPRETING and isinstance(target_architecture(), int)
    return {"maxnreg": 255} if on_cuda else {}


def algebra_config(channels: int, prior_channels: int, head_width: int) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K of the algebra's matrix tiles, BLOCK_H of its tiles of a head's rows, and warps."""
    width = max(tile_width(channels), tile_width(prior_channels))
    if INTERPRETING:  # a program costs milliseconds there: few, and yet several for widths that are no power of two
        m = n = k = max(16, min(width // 2, 128))
        warps = 4
    else:
        m, n, k, warps = next(ALGEBRA[widest] for widest in sorted(ALGEBRA) if width <= widest)
    return m, n, k, min(tile_width(head_width), 32), warps
