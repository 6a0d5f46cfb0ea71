"""Ahead-of-time compilation of every kernel through its real launcher, for GPUs that are not here, and what it costs.

A driver that only names a target stands in for the GPU's; launchers then specialise and compile exactly what they would
launch. Resources come from the compiled binary: `cuobjdump` for NVIDIA, the metadata of the assembly for AMD.
`python tests/kernels/aot.py` prints the table for all targets, widths, dtypes and layouts (minutes).
"""

import argparse
import dataclasses
import importlib.util
import json
import re
import subprocess
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ALGEBRA = ("tiles", "forward", "backward", "gradients")  # files kernels/attention/algebra_*.py
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class FixedTarget:
    """The part of a Triton driver that compiling needs; launching does nothing."""

    def __init__(self, name: str):
        self.target = TARGETS[name]
        self.device = list(TARGETS).index(name)  # JIT caches are kept by device
        self.utils = types.SimpleNamespace(
            load_binary=lambda *_: (None, None, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 1 << 30},
            unload_module=lambda _: None,
        )

    def launcher_cls(self, src, metadata):
        return lambda *args: None

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0


@dataclasses.dataclass(frozen=True)
class Build:
    """One compiled kernel. spills: bytes of stack (NVIDIA) or spilled registers (AMD); wide: 128-bit loads."""

    target: str
    kernel: str
    case: str
    warps: int
    registers: int
    spills: int
    shared: int
    loads: int
    wide: int


def compiled(name: str, case: str, launch, kernels) -> Iterator[Build]:
    """Runs `launch` against the target and yields what its kernels were compiled to."""
    driver.set_active(FixedTarget(name))
    caches = {kernel: kernel.device_caches[list(TARGETS).index(name)][0] for kernel in kernels}
    before = {kernel: set(cache) for kernel, cache in caches.items()}
    launch()
    for kernel, cache in caches.items():
        for key in set(cache) - before[kernel]:
            binary = cache[key]
            metadata = binary.metadata
            read = _amd_resources if name.startswith("gfx") else _nvidia_resources
            registers, spills, loads, wide = read(binary.asm)
            yield Build(
                name, kernel.fn.__name__, case, metadata.num_warps, registers, spills, metadata.shared, loads, wide
            )


def _nvidia_resources(asm) -> tuple[int, int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("--dump-resource-usage", file.name)
        sass = _tool("-sass", file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.[^ ]*", sass)
    return registers, stack, len(loads), sum(".128" in load for load in loads)


def _tool(option: str, path: str) -> str:
    return subprocess.run([BIN / "cuobjdump", option, path], check=True, capture_output=True, text=True).stdout


def _amd_resources(asm) -> tuple[int, int, int, int]:
    text = asm["amdgcn"]
    value = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
    loads = re.findall(r"\b(?:global|buffer)_load_\w+", text)
    return value["vgpr_count"], value["vgpr_spill_count"], len(loads), sum("dwordx4" in load for load in loads)


def plane(batch: int, channels: int, pixels: int, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    """A map [B, C, N] without storage, in either layout."""
    shape = (batch, pixels, channels) if channels_last else (batch, channels, pixels)
    empty = torch.empty(shape, dtype=dtype, device="meta")
    return empty.mT if channels_last else empty


def attention_kernels() -> list:
    """All jitted kernels of semantic attention that are launched; of an earlier checkout those that it has."""
    names = ("triton_forward", "triton_backward", *(f"algebra_{part}" for part in ALGEBRA))
    there = [name for name in names if importlib.util.find_spec(f"kernels.attention.{name}") is not None]
    modules = [importlib.import_module(f"kernels.attention.{name}") for name in there]
    return list({k: None for m in modules for n, k in vars(m).items() if n.endswith("_kernel")})


def aggregation_kernels() -> list:
    """All jitted kernels of level aggregation that are launched."""
    from kernels.aggregation import triton as passes

    return [kernel for name, kernel in vars(passes).items() if name.endswith("_kernel")]


@dataclasses.dataclass(frozen=True)
class Attention:
    """Semantic attention on maps without storage."""

    C: int
    D: int = 64
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = False
    batch: int = 2
    pixels: int = 4096
    heads: int = 4

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        return f"C={self.C} D={self.D} B={self.batch} N={self.pixels} {str(self.dtype)[6:]} {layout}"

    def launch(self) -> None:
        from kernels.attention import triton as passes
        from kernels.attention.algebra import Weights

        B, C, D, N = self.batch, self.C, self.D, self.pixels
        x, p = (plane(B, c, N, self.dtype, self.channels_last) for c in (C, D))
        shapes = Weights((C,), (C,), (C, C), (C, D), (C, D), (self.heads,), (2 * C, C), (C,))
        weights = Weights(*(torch.empty(shape, device="meta") for shape in shapes))
        state = passes.forward(x, p, weights, 1e-6, torch.empty_like(x))
        passes.backward(x, x, p, weights, *state, torch.empty_like(x), torch.empty_like(p))


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """Level aggregation on maps without storage; the finest level has the target's size."""

    D: int = 64
    G: int = 4
    sizes: tuple[int, ...] = (64, 32, 16, 8)
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = False

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        return f"D={self.D} G={self.G} levels={'/'.join(map(str, self.sizes))} {str(self.dtype)[6:]} {layout}"

    def launch(self) -> None:
        from kernels.aggregation import triton as passes

        layout = torch.channels_last if self.channels_last else torch.contiguous_format

        def level(channels: int, size: int) -> torch.Tensor:
            return torch.empty(2, channels, size, size, dtype=self.dtype, device="meta", memory_format=layout)

        values = [level(self.D, size) for size in self.sizes]
        logits = [level(self.G, size) for size in self.sizes]
        out = level(self.D, self.sizes[0])
        lse = passes.forward_pass(values, logits, out)
        passes.backward_pass(out, values, logits, lse, values, logits)


BACKBONE_WIDTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512)
# What the test run compiles for every target: each width that a backbone declares, both layouts.
CHOSEN = (
    *(Attention(C) for C in BACKBONE_WIDTHS),
    Attention(64, channels_last=True),
    Aggregation(),
    Aggregation(channels_last=True),
)
# What one target proves for all: other dtypes, sizes of 1 (Triton makes constants of them), 64-bit offsets.
ONCE = (
    Attention(64, dtype=torch.float32),
    Attention(64, dtype=torch.float16),
    Attention(16, 16, batch=1, pixels=1),
    Attention(64, pixels=48_000_000, batch=1),
    Aggregation(sizes=(1, 1), dtype=torch.float32),
)
ONCE_TARGET = "sm_90"
FULL = (
    *CHOSEN,
    *(Attention(C, channels_last=True) for C in BACKBONE_WIDTHS if C != 64),
    *(Attention(C, dtype=dtype) for dtype in (torch.float32, torch.float16) for C in (48, 64, 128, 256)),
    *(Attention(C, D) for C, D in ((16, 16), (64, 32), (128, 128), (320, 64), (512, 512))),
    *(Aggregation(G=G, dtype=dtype) for G, dtype in ((1, torch.bfloat16), (8, torch.bfloat16), (4, torch.float32))),
)


def builds(target: str, cases: Sequence[Attention | Aggregation]) -> Iterator[Build]:
    """Everything that the cases make their launchers compile for one target."""
    for case in cases:
        kernels = attention_kernels() if isinstance(case, Attention) else aggregation_kernels()
        yield from compiled(target, str(case), case.launch, kernels)


def table(rows: Sequence[Build]) -> str:
    """Markdown table of builds."""
    lines = [
        "| target | kernel | first compiled for | warps | registers | spills | shared, B | 128-bit / all loads |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {b.target} | {b.kernel} | {b.case} | {b.warps} | {b.registers} | {b.spills} | {b.shared} |"
        f" {b.wide}/{b.loads} |"
        for b in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="default: all")
    parser.add_argument("--full", action="store_true", help="more dtypes, layouts and widths than the tests")
    parser.add_argument("--json", type=Path, help="write the builds here instead of printing a table")
    args = parser.parse_args()
    rows = []
    for target in args.target or TARGETS:
        cases = FULL if args.full else CHOSEN
        rows += builds(target, (*cases, *ONCE) if target == ONCE_TARGET else cases)
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
