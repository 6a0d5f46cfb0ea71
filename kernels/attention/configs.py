"""Launch configurations of semantic attention, keyed by width, dtype and architecture: never by H·W or batch.

Chosen from ahead-of-time compilation (no spill, shared memory within every target's budget) and, for Hopper, from a
sweep on an H200. `refusal` holds what no row may be: launches of those kinds gave wrong gradients, raced or died on
that GPU (Triton 3.6, whose assembler lost operands of wgmma: docs/benchmarks/kernels_lint.md), and
tests/kernels/lint.py looks for the same in what any Triton at hand compiles.
"""

import torch

from kernels.runtime import INTERPRETING, target_architecture

TILED = ("apply", "reduce", "feature_gradient", "prior_gradient")
PRODUCTS = ("gram", "gradient", *TILED)  # kernels with matrix products

# (kernel, bytes an element) → {widest padded channel count: (BLOCK_N, warps)}. Where a fused kernel has no row for a
# width, the wide route takes over: Grams by the vendor's GEMM, gradients by tiles.
GENERAL = {
    ("gram", 2): {64: (64, 4), 128: (64, 8)},
    ("gram", 4): {64: (16, 8)},
    ("normalise", 2): {256: (64, 8), 512: (32, 8)},
    ("normalise", 4): {256: (32, 8), 512: (16, 8)},
    ("apply", 2): {64: (128, 4), 128: (128, 8), 512: (64, 8)},
    ("apply", 4): {512: (16, 8)},
    ("reduce", 2): {512: (64, 8)},
    ("reduce", 4): {512: (16, 8)},
    ("gradient", 2): {64: (64, 8), 128: (64, 8)},
    ("gradient", 4): {},
    ("feature_gradient", 2): {512: (64, 8)},
    ("feature_gradient", 4): {512: (16, 8)},
    ("norm_gradient", 2): {256: (32, 8), 512: (16, 8)},
    ("norm_gradient", 4): {256: (32, 8), 512: (16, 8)},
    ("prior_gradient", 2): {512: (64, 8)},
    ("prior_gradient", 4): {512: (16, 8)},
}
# Where a target differs. Ampere keeps operands in registers: 64 px of all channels spill there, so its Grams and
# gradients take the wide route. gfx942 has less shared memory and wider waves; its matrix instructions read registers
# and are waited for one by one, so neither of Hopper's faults exists there, and tiles below 64 px stay.
BY_ARCHITECTURE: dict[int | str, dict[tuple[str, int], dict[int, tuple[int, int]]]] = {
    80: {
        ("gram", 2): {},
        ("gradient", 2): {},
        ("apply", 2): {64: (64, 4), 512: (64, 8)},
    },
    100: {("apply", 2): {64: (64, 4), 512: (64, 8)}},
    "gfx942": {
        ("apply", 2): {64: (64, 4), 512: (64, 8)},
        ("reduce", 2): {64: (64, 4), 512: (32, 8)},
        ("gram", 4): {64: (16, 4)},
        ("gram", 2): {64: (32, 4), 128: (32, 8)},
        ("gradient", 2): {64: (64, 8), 128: (16, 8)},
        ("prior_gradient", 2): {512: (32, 8)},
    },
}

# (C, D, dtype) that take the wide route whatever their width: `kernels.routes.use` puts them here.
TILED_GROUPS: set[tuple[int, int, torch.dtype]] = set()


def refusal(kernel: str, itemsize: int, tiles: tuple[int, int], config: tuple[int, int], nvidia: bool) -> str:
    """Why a launch must not be; empty if it may. tiles: padded channels of x and p; config: (BLOCK_N, warps).

    Right were all launches with 64 px and more (H200, bf16 and fp16), and all in float32, whose products are tf32.
    """
    (wide, prior), (pixels, warps) = tiles, config
    lanes = warps * (32 if nvidia else 64)
    if kernel == "gram" and wide * wide + wide * prior + prior * prior > 128 * lanes:
        return "the sums of its three Grams take more than 128 registers of a thread"
    if nvidia and itemsize == 2 and kernel in PRODUCTS and pixels < 64:
        return "products of 2-byte operands over fewer than 64 px"
    return ""


def tile_width(channels: int) -> int:
    """Power of two that holds the channels, at least the 16 of a matrix instruction."""
    return max(16, 1 << (channels - 1).bit_length())


def _rows(kernel: str, dtype: torch.dtype) -> dict[int, tuple[int, int]]:
    architecture = target_architecture()
    if isinstance(architecture, int) and 80 < architecture < 90:
        architecture = 80
    key = (kernel, min(dtype.itemsize, 4))
    return BY_ARCHITECTURE.get(architecture, {}).get(key, GENERAL[key])


def _row(kernel: str, channels: int, prior_channels: int, dtype: torch.dtype) -> tuple[int, int] | None:
    """(BLOCK_N, warps) of the narrowest row that holds both widths; None without one, or where it is refused."""
    tiles = tile_width(channels), tile_width(prior_channels)
    rows = _rows(kernel, dtype)
    config = next((rows[widest] for widest in sorted(rows) if max(tiles) <= widest), None)
    nvidia = isinstance(target_architecture(), int)
    return None if config is None or refusal(kernel, min(dtype.itemsize, 4), tiles, config, nvidia) else config


def fused(kernel: str, channels: int, prior_channels: int, dtype: torch.dtype) -> bool:
    """Whether one program of this kernel can hold all channels of a pixel, so that x and p are read once."""
    if (channels, prior_channels, dtype) in TILED_GROUPS:
        return False
    if INTERPRETING:
        return max(tile_width(channels), tile_width(prior_channels)) <= 128
    return _row(kernel, channels, prior_channels, dtype) is not None


def launch_config(kernel: str, channels: int, prior_channels: int, dtype: torch.dtype) -> dict[str, int]:
    """BLOCK sizes and warps of one kernel for C and D channels."""
    if INTERPRETING:  # small tiles, so that small tests cross their borders
        config = {"BLOCK_N": 16}
    else:
        row = _row(kernel, channels, prior_channels, dtype)
        assert row is not None, f"{kernel} has no launch for {channels} and {prior_channels} channels of {dtype}"
        pixels, warps = row
        config = {"BLOCK_N": pixels, "num_warps": warps}
    if kernel in TILED:
        narrow = dtype.itemsize == 2 or INTERPRETING
        widest = 128 if kernel in ("apply", "reduce") and narrow else 64
        # Three matrices and three maps at once: 64 channels of them spill where operands live in registers.
        if kernel == "prior_gradient" and (not narrow or (not INTERPRETING and target_architecture() in range(80, 90))):
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
