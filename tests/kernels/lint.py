"""Which launches a GPU would get wrong, told from what was compiled: TTGIR, PTX and machine code, no GPU needed.

    python tests/kernels/lint.py                   # every launch of the table, sm_90: nothing may be found
    python tests/kernels/lint.py --measured now    # what the table chooses where a launch was measured on an H200
    PYTHONPATH=<checkout of 4a9eb23> python tests/kernels/lint.py --measured was     # those launches as they were
    python tests/kernels/lint.py --table F… > docs/benchmarks/kernels_lint.md        # from the output of all of these

Two rules are causes, found in the machine code of every launch that was wrong (machine.py): a wgmma whose descriptor
is not the one that PTX asked for, and registers overwritten while a wgmma may still read them. Two are shapes that
only went with them in TTGIR: a pixel-major B with a swizzle under 128 bytes against a transposed A, and more warps
along the rows than the tile has rows for.
"""

import argparse
import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import triton
from aot import (
    BACKBONE_WIDTHS,
    TARGETS,
    Attention,
    FixedTarget,
    _nvidia_resources,
    _tool,
    attention_kernels,
    plane,
)
from machine import compare_descriptors, instructions, reused_registers
from triton.runtime import driver

TARGET = "sm_90"
CAUSES, SHAPES = ("descriptors", "reuse", "unproved"), ("swizzle", "rows")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One rule broken by one compiled kernel."""

    rule: str
    text: str


_ALIAS = re.compile(r"^(#\w+) = #ttg\.(nvmma_shared|nvidia_mma)<\{(.*)\}>", re.M)
_DOT = re.compile(r"warp_group_dot [^:]*:\s*(\S.*?)\s\*\s(\S.*?>)(?:,[^>]*)?\s->\stensor<(\d+)x(\d+)x\w+, (#\w+)>")


def shape_findings(ttgir: str) -> list[Finding]:
    """The two shapes of TTGIR that went with wrong results."""
    layouts = {name: text for name, _, text in _ALIAS.findall(ttgir)}

    def shared(operand: str) -> tuple[int, bool] | None:
        name = next((n for n in layouts if re.search(rf"{n}\b", operand) and "swizzlingByteWidth" in layouts[n]), None)
        if "memdesc" not in operand or name is None:
            return None
        width = int(re.search(r"swizzlingByteWidth = (\d+)", layouts[name])[1])
        return width, "transposed = true" in layouts[name]

    found = []
    for a, b, rows, _, product in _DOT.findall(ttgir):
        a, b = shared(a), shared(b)
        if a and b and a[1] and not b[1] and b[0] < 128:
            found.append(Finding("swizzle", f"pixel-major B with a swizzle of {b[0]} bytes against a transposed A"))
        warps = int(re.search(r"warpsPerCTA = \[(\d+)", layouts[product])[1])
        if 16 * warps > int(rows):
            found.append(Finding("rows", f"{warps} warps along {rows} rows"))
    return list(dict.fromkeys(found))


def machine_findings(ptx: str, cubin: bytes, warps: int) -> list[Finding]:
    """The two causes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = instructions(_tool("-sass", file.name))
    try:
        compared = compare_descriptors(ptx, code, warps)
    except ValueError as error:
        return [Finding("unproved", str(error))]
    found = []
    if compared.lost:
        found.append(Finding("descriptors", f"{len(compared.lost)} of {compared.compared}: {compared.lost[0]}"))
    if compared.unknown:
        found.append(Finding("unproved", f"{compared.unknown} descriptors are not settled by constants"))
    reused = reused_registers(code)
    if reused:
        found.append(Finding("reuse", f"{len(reused)} times: {reused[0]}"))
    return found


@dataclasses.dataclass(frozen=True)
class Answer:
    """The lint's answer on one kernel of one launch."""

    kernel: str
    tile: str  # BLOCK_N/warps; of a kernel without a row in the launch table its warps alone
    registers: int
    spills: int
    findings: tuple[Finding, ...]


def launch(case: Attention, kernel: str | None) -> None:
    """The whole case, or the pass that one kernel belongs to."""
    from kernels.attention import triton as passes

    if kernel is None:
        return case.launch()
    B, C, D, N = case.batch, case.C, case.D, case.pixels
    x, p = (plane(B, c, N, case.dtype, case.channels_last) for c in (C, D))
    if kernel == "gram":
        passes.gram_pass(x, p, 1e-6)
        return None
    mean, rstd = torch.empty(2, B, N, device="meta").unbind()
    passes.gradient_pass(x, x, p, mean, rstd, *_coefficients(case), torch.empty_like(x), torch.empty_like(p))
    return None


def _coefficients(case: Attention) -> tuple:
    """What the gradient pass reads beside maps; the earlier commit's has other arguments."""
    B, C, D = case.batch, case.C, case.D
    try:
        from kernels.attention.algebra_launch import Coefficients
    except ImportError:
        from kernels.attention.algebra import Modulation, gram_size, split_grams

        modulation = Modulation(*torch.empty(B, 2, C, D, device="meta").unbind(1))
        return modulation, split_grams(torch.empty(B, gram_size(C, D), device="meta"), C, D)
    gain, shift, cross = torch.empty(3, B, C, D, device="meta", dtype=case.dtype).unbind()
    hzz, hpp = (torch.empty(B, c, c, device="meta", dtype=case.dtype) for c in (C, D))
    dzs, dps = (torch.empty(B, c, device="meta") for c in (C, D))
    return (Coefficients(gain, shift, torch.empty(5, B, device="meta"), cross, hzz, hpp, dzs, dps),)


def answers(case: Attention, kernel: str | None = None, tile: tuple[int, int] | None = None) -> list[Answer]:
    """What Hopper would run of a case: all its kernels, or those of one kernel's pass, if given with a forced tile."""
    from kernels.attention import configs, triton_backward, triton_forward

    chosen, fused = configs.launch_config, configs.fused
    tiles = {}

    def forced(name: str, *sizes) -> dict[str, int]:
        config = {} if tile and name == kernel else chosen(name, *sizes)
        pixels, warps = tile if tile and name == kernel else (config["BLOCK_N"], config["num_warps"])
        tiles[name] = f"{pixels}/{warps}"
        return config | {"BLOCK_N": pixels, "num_warps": warps}

    driver.set_active(FixedTarget(TARGET))
    kernels = attention_kernels()
    caches = {kernel: kernel.device_caches[list(TARGETS).index(TARGET)][0] for kernel in kernels}
    for cache in caches.values():
        cache.clear()
    modules = (triton_forward, triton_backward)
    for module in modules:
        module.launch_config = forced
        module.fused = lambda name, *sizes: bool(tile and name == kernel) or fused(name, *sizes)
    try:
        launch(case, kernel)
    finally:
        for module in modules:
            module.launch_config, module.fused = chosen, fused
    found = []
    for jitted, cache in caches.items():
        for binary in cache.values():
            name = jitted.fn.__name__.removesuffix("_kernel")
            registers, spills, _, _ = _nvidia_resources(binary.asm)
            lines = machine_findings(binary.asm["ptx"], binary.asm["cubin"], binary.metadata.num_warps)
            findings = (*lines, *shape_findings(binary.asm["ttgir"]))
            tile_of = tiles.get(name, f"{binary.metadata.num_warps} warps")
            found.append(Answer(name, tile_of, registers, spills, findings))
    return found


@dataclasses.dataclass(frozen=True)
class Row:
    """One launch measured on an H200 (Triton 3.6.0): the kernel forced, what came out, and whether it was right."""

    case: Attention
    kernel: str
    tile: tuple[int, int]
    measured: str
    right: bool


def _rows() -> tuple[Row, ...]:
    last, half = {"channels_last": True}, torch.float16
    crash = "illegal memory access"
    return (
        Row(Attention(96), "gradient", (32, 8), "dp 0.72", False),
        Row(Attention(80), "gradient", (32, 8), "dp 0.63–0.72", False),
        Row(Attention(128), "gradient", (32, 8), "dp 0.63–0.72", False),
        Row(Attention(64, 128), "gradient", (32, 8), "dp 0.62", False),
        Row(Attention(128), "gradient", (16, 4), crash, False),
        Row(Attention(128), "gradient", (32, 4), crash, False),
        Row(Attention(64), "gradient", (32, 4), crash, False),
        Row(Attention(128), "gradient", (16, 8), "dp 0.63", False),
        Row(Attention(64), "gradient", (32, 8), "dp 0.63", False),
        Row(Attention(128, 128, **last), "gram", (32, 8), "y 7.8e-3, weights 0.18, does not repeat", False),
        Row(Attention(64), "gradient", (128, 8), "right", True),
        Row(Attention(128), "gradient", (64, 8), "right", True),
        Row(Attention(128), "gradient", (64, 4), "right", True),
        Row(Attention(64), "gradient", (64, 8), "right", True),
        Row(Attention(64, **last), "gradient", (32, 8), "right", True),
        Row(Attention(96, **last), "gradient", (32, 8), "right", True),
        Row(Attention(64, 128, **last), "gradient", (32, 8), "right", True),
        Row(Attention(128, 128), "gradient", (32, 8), "right", True),
        Row(Attention(128, 128, half), "gradient", (32, 8), "right", True),
        Row(Attention(128, 128), "gram", (32, 8), "right", True),
        Row(Attention(64, **last), "gram", (64, 8), "right", True),
        Row(Attention(96, **last), "gram", (32, 8), "right", True),
    )


ROWS = _rows()


def judge(index: int, now: bool) -> dict:
    """The lint on a measured launch as it was, or on what the table chooses for the same case."""
    row = ROWS[index]
    found = answers(row.case, row.kernel, None if now else row.tile)
    return {
        "row": index,
        "now": now,
        "triton": triton.__version__,
        "launch": ", ".join(f"{'' if a.kernel == row.kernel else a.kernel + ' '}{a.tile}" for a in found),
        "spills": max(a.spills for a in found),
        "findings": [dataclasses.asdict(f) for a in found for f in a.findings],
    }


def chosen_cases() -> list[Attention]:
    """Every backbone width in both layouts and the three dtypes, and other prior widths."""
    half, full = torch.float16, torch.float32
    cases = [Attention(C, channels_last=last) for C in BACKBONE_WIDTHS for last in (False, True)]
    cases += [
        Attention(C, D, channels_last=last) for C, D in ((16, 16), (64, 128), (128, 128)) for last in (False, True)
    ]
    cases += [Attention(C, 64, dtype, last) for dtype in (half, full) for C in (64, 128, 256) for last in (False, True)]
    return cases


def _shown(answer: dict | None) -> str:
    if answer is None:
        return "not compiled"
    causes = [f"**{f['rule']}**: {f['text']}" for f in answer["findings"] if f["rule"] in CAUSES]
    shapes = [f"{f['rule']}: {f['text']}" for f in answer["findings"] if f["rule"] in SHAPES]
    return "; ".join(causes + shapes) or "clean"


def table(found: Sequence[dict]) -> str:
    """Markdown of judged rows: one line a measured launch and Triton."""
    answer = {(f["row"], f["triton"]): f for f in found if not f["now"]}
    # Rows of one case and kernel have one launch now.
    chosen = {(ROWS[f["row"]].case, ROWS[f["row"]].kernel, f["triton"]): f for f in found if f["now"]}
    lines = [
        "| Triton | launch of semantic attention | was | measured | lint on it | now | lint on that |",
        "|---|---|---|---|---|---|---|",
    ]
    for version in sorted({f["triton"] for f in found}):
        for index, row in enumerate(ROWS):
            was, now = answer.get((index, version)), chosen.get((row.case, row.kernel, version))
            case = str(row.case).replace(" B=2 N=4096", "").replace(" bfloat16", "")
            lines.append(
                f"| {version} | {row.kernel}, {case} | {row.tile[0]}/{row.tile[1]} | {row.measured} | {_shown(was)} |"
                f" {now['launch'] if now else ''} | {_shown(now)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", choices=["was", "now"], help="only the launches known from a GPU")
    parser.add_argument("--row", type=int, action="append", help="of the measured launches these alone, from 0")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these outputs and stop")
    args = parser.parse_args()
    if args.table:
        print(
            table(
                [json.loads(line) for path in args.table for line in path.read_text().splitlines() if line[:1] == "{"]
            )
        )
        return
    refused = 0
    for item in (args.row or range(len(ROWS))) if args.measured else chosen_cases():
        if args.measured:
            lines = [judge(item, args.measured == "now")]
        else:
            lines = [{"case": str(item)} | dataclasses.asdict(answer) for answer in answers(item)]
        for line in lines:
            print(json.dumps(line, ensure_ascii=False), flush=True)
            refused += any(f["rule"] in CAUSES for f in line["findings"])
    if refused and args.measured != "was":
        sys.exit(f"{refused} of the launches that the table chooses are refused")


if __name__ == "__main__":
    main()
