"""Which launches a GPU would get wrong, told from what was compiled: TTGIR, PTX and machine code, no GPU needed.

    python tests/kernels/lint.py                      # every launch of the table, sm_90: nothing may be found
    python tests/kernels/lint.py --wrong --json F     # the launches measured on an H200 (docs/benchmarks/kernels_lint.md)
    python tests/kernels/lint.py --table F G > docs/benchmarks/kernels_lint.md    # from the JSON of two Tritons

Two rules are causes, found in the machine code of every launch that was wrong (machine.py): a wgmma whose descriptor is
not the one that PTX asked for, and registers overwritten while a wgmma may still read them. Two are shapes that only went
with them in TTGIR: a pixel-major B with a swizzle under 128 bytes against a transposed A, and more warps along the rows
than the tile has rows for.
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
    tile: str  # BLOCK_N/warps
    registers: int
    spills: int
    findings: tuple[Finding, ...]


def answers(case: Attention, force: dict[str, tuple[int, int]] | None = None) -> list[Answer]:
    """Every kernel that the case's launcher compiles for Hopper; force: (BLOCK_N, warps) by kernel, else the table's."""
    from kernels.attention import configs, triton_backward, triton_forward

    chosen, fused = configs.launch_config, configs.fused
    tiles = {}

    def forced(kernel: str, *sizes) -> dict[str, int]:
        config = {} if kernel in (force or {}) else chosen(kernel, *sizes)
        pixels, warps = (force or {}).get(kernel) or (config["BLOCK_N"], config["num_warps"])
        tiles[kernel] = f"{pixels}/{warps}"
        return config | {"BLOCK_N": pixels, "num_warps": warps}

    driver.set_active(FixedTarget(TARGET))
    kernels = attention_kernels()
    caches = {kernel: kernel.device_caches[list(TARGETS).index(TARGET)][0] for kernel in kernels}
    for cache in caches.values():
        cache.clear()
    modules = (triton_forward, triton_backward)
    for module in modules:
        module.launch_config = forced
        module.fused = lambda kernel, *sizes: kernel in (force or {}) or fused(kernel, *sizes)
    try:
        case.launch()
    finally:
        for module in modules:
            module.launch_config, module.fused = chosen, fused
    found = []
    for kernel, cache in caches.items():
        for binary in cache.values():
            name = kernel.fn.__name__.removesuffix("_kernel")
            registers, spills, _, _ = _nvidia_resources(binary.asm)
            lines = machine_findings(binary.asm["ptx"], binary.asm["cubin"], binary.metadata.num_warps)
            findings = (*lines, *shape_findings(binary.asm["ttgir"]))
            found.append(Answer(name, tiles[name], registers, spills, findings))
    return found


@dataclasses.dataclass(frozen=True)
class Row:
    """One launch that was measured on an H200 (Triton 3.6.0): the kernel forced, what came out, and whether it was right."""

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


def judge(row: Row) -> dict:
    """The lint on the launch as it was measured, and on the one that the table now chooses for the same case."""
    old = next(a for a in answers(row.case, {row.kernel: row.tile}) if a.kernel == row.kernel)
    now = answers(row.case)
    successors = (row.kernel,) if any(a.kernel == row.kernel for a in now) else {
        "gradient": ("feature_gradient", "norm_gradient", "prior_gradient"),
        "gram": ("normalise",),
    }[row.kernel]
    new = [a for a in now if a.kernel in successors]
    return {
        "case": str(row.case),
        "kernel": row.kernel,
        "tile": f"{row.tile[0]}/{row.tile[1]}",
        "measured": row.measured,
        "right": row.right,
        "old": [dataclasses.asdict(f) for f in old.findings],
        "new tile": ", ".join(a.tile if a.kernel == row.kernel else f"{a.kernel} {a.tile}" for a in new),
        "new": [dataclasses.asdict(f) for a in new for f in a.findings],
        "triton": triton.__version__,
    }


def chosen_cases() -> list[Attention]:
    """Every backbone width in both layouts and the three dtypes, and other prior widths."""
    half, full = torch.float16, torch.float32
    cases = [Attention(C, channels_last=last) for C in BACKBONE_WIDTHS for last in (False, True)]
    cases += [Attention(C, D, channels_last=last) for C, D in ((16, 16), (64, 128), (128, 128)) for last in (False, True)]
    cases += [Attention(C, 64, dtype, last) for dtype in (half, full) for C in (64, 128, 256) for last in (False, True)]
    return cases


def _shown(findings: Sequence[dict]) -> str:
    return "; ".join(f"**{f['rule']}** {f['text']}" if f["rule"] in CAUSES else f"{f['rule']}: {f['text']}" for f in findings)


def table(rows: Sequence[dict]) -> str:
    """Markdown of judged rows, by Triton."""
    lines = [
        "# Which launches the lint refuses",
        "",
        "`python tests/kernels/lint.py --wrong`: each launch of semantic attention whose result is known from an H200 (Triton 3.6.0),",
        "compiled again as it was, and as the launch table chooses today; bf16, B=2, N=4096. Bold: found in the machine code, a cause.",
        "Plain: a shape in TTGIR that went with wrong results, and that right launches have too.",
        "",
        "| Triton | launch | was | measured | lint on it | now | lint on that |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r["triton"], r["right"])):
        case = r["case"].replace(" B=2 N=4096", "").replace(" bfloat16", "")
        lines.append(
            f"| {r['triton']} | {r['kernel']}, {case} | {r['tile']} | {r['measured']} | {_shown(r['old']) or 'clean'} |"
            f" {r['new tile']} | {_shown(r['new']) or 'clean'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wrong", action="store_true", help="the measured launches instead of the table's")
    parser.add_argument("--json", type=Path, help="write the answers here, one JSON line each")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these files and stop")
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(line) for path in args.table for line in path.read_text().splitlines()]))
        return
    lines = []
    for item in ROWS if args.wrong else chosen_cases():
        new = [judge(item)] if args.wrong else [{"case": str(item)} | dataclasses.asdict(a) for a in answers(item)]
        lines += new
        for line in new:
            print(json.dumps(line, ensure_ascii=False), flush=True)
    if args.json:
        args.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused = [line for line in lines if any(f["rule"] in CAUSES for f in line["new" if args.wrong else "findings"])]
    if refused:
        sys.exit(f"{len(refused)} of {len(lines)} launches that the table chooses are refused")


if __name__ == "__main__":
    main()
