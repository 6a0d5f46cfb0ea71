"""Ahead-of-time compilation of every kernel through its real launcher, for GPUs that are not here, and what it costs.

A driver that only names a target stands in for the GPU's; launchers then specialise and compile exactly what they would
launch. Resources come from the compiled binary: `cuobjdump` for NVIDIA, the metadata of the assembly for AMD.
`python tests/kernels/aot.py` prints the table for all targets, widths, dtypes and layouts (minutes).
"""

import dataclasses
import re
import subprocess
import tempfile
import types
from collections.abc import Iterator
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


def attention_launches(C: int, D: int, dtype=torch.bfloat16, channels_last=False, pixels=4096):
    """The four passes of semantic attention on maps without storage."""
    from kernels.attention import triton as passes
    from kernels.attention.algebra import gram_size, split_grams

    def launch():
        x, p = plane(2, C, pixels, dtype, channels_last), plane(2, D, pixels, dtype, channels_last)
        _, mean, rstd = passes.gram_pass(x, p, 1e-6)
        modulation = passes.reduce_pass(x, x, p, mean, rstd)
        passes.apply_pass(x, p, mean, rstd, modulation, torch.empty_like(x))
        grams = split_grams(torch.empty(2, gram_size(C, D), device="meta"), C, D)
        passes.gradient_pass(x, x, p, mean, rstd, modulation, grams, torch.empty_like(x), torch.empty_like(p))

    return launch


def attention_kernels() -> list:
    """All jitted kernels of semantic attention."""
    from kernels.attention import triton_backward, triton_forward

    modules = (triton_forward, triton_backward)
    return list({k: None for m in modules for n, k in vars(m).items() if n.endswith("_kernel")})


def aggregation_launches(D: int, G: int, dtype=torch.bfloat16, channels_last=False, levels: int = 4):
    """Both passes of level aggregation on maps without storage: levels of strides 4 to 32 to a 64² target."""
    from kernels.aggregation import triton as passes

    layout = torch.channels_last if channels_last else torch.contiguous_format

    def level(channels: int, size: int):
        return torch.empty(2, channels, size, size, dtype=dtype, device="meta").contiguous(memory_format=layout)

    def launch():
        values = [level(D, 64 >> i) for i in range(levels)]
        logits = [level(G, 64 >> i) for i in range(levels)]
        out = level(D, 64)
        lse = passes.forward_pass(values, logits, out)
        passes.backward_pass(out, values, logits, lse, values, logits)

    return launch


def aggregation_kernels() -> list:
    """All jitted kernels of level aggregation that are launched."""
    from kernels.aggregation import triton as passes

    return [passes.aggregate_kernel, passes.share_kernel, passes.level_gradient_kernel]
