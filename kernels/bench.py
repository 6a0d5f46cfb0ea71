"""Correctness, then timings of both operations on the GPU at hand: one JSON, one table, one roofline plot. No network.

    python -m kernels.bench                        # GPU: full report into docs/benchmarks/
    python -m kernels.bench --device cpu --quick   # CPU: dry run with the reference at small sizes

Rows: composed eager, Gram form eager (the reference), torch.compile of both, Triton; NCHW and channels_last; forward,
backward and both. A speed-up is not reported unless every correctness row passed.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kernels.aggregation.reference import composed_aggregation
from kernels.attention.algebra import Weights
from kernels.attention.reference import composed_attention
from kernels.cases import aggregation_case, attention_case, call_aggregation, call_attention

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"
# U-Net widths 32, 48, 64 at 256² crops (levels of stride 1, 2, 4, 8), and a 720p photograph at stride 2.
ATTENTION_SHAPES = [
    (batch, width << level, 256 >> level, 256 >> level)
    for width in (32, 48, 64)
    for batch in (8, 32)
    for level in (1, 2, 3)
] + [(1, 64, 360, 640), (1, 128, 180, 320)]
AGGREGATION_SHAPES = [(8, 128, 128), (32, 64, 64), (1, 360, 640)]
PRIOR, GROUPS, HEAD = 64, 4, 32


def attention_traffic(shape: tuple[int, ...], itemsize: int) -> dict[str, tuple[float, float]]:
    """(bytes, FLOPs) that the two-pass method needs: see kernels/attention/README.md."""
    B, C, H, W = shape
    N, D = B * H * W, PRIOR
    x, p, stats = N * C * itemsize, N * D * itemsize, N * 8
    forward = (3 * x + 2 * p + 2 * stats, 2 * N * (C * C + C * D + D * D + 2 * C * D))
    backward = (5 * x + 3 * p + 2 * stats, 2 * N * (2 * C * D + 5 * C * D + C * C + D * D))
    return {"forward": forward, "backward": backward, "both": (forward[0] + backward[0], forward[1] + backward[1])}


def aggregation_traffic(levels: list[Tensor], shape: tuple[int, int, int]) -> dict[str, tuple[float, float]]:
    """(bytes, FLOPs) of aggregation with every level read once a pass: see kernels/aggregation/README.md."""
    B, H, W = shape
    N, itemsize = B * H * W, levels[0].element_size()
    source, target, count = sum(t.numel() for t in levels) * itemsize, N * PRIOR * itemsize, len(levels) // 2
    state = N * GROUPS * 4
    forward = (source + target + state, N * count * 10 * PRIOR)
    backward = (2 * source + 2 * target + (4 * count + 1) * state, N * count * 20 * PRIOR)
    return {"forward": forward, "backward": backward, "both": (forward[0] + backward[0], forward[1] + backward[1])}


def median_ms(run: Callable[[], object], device: str) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantiles in milliseconds."""
    if device == "cuda":
        from triton.testing import do_bench

        return tuple(do_bench(run, quantiles=[0.2, 0.5, 0.8]))
    run()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return tuple(statistics.quantiles(times, n=5)[i] for i in (0, 2, 3)) if len(times) > 4 else (min(times),) * 3


def ceiling(device: str) -> float:
    """Bytes a second of a large copy (read + write) in this run."""
    source = torch.empty((1 << 30 if device == "cuda" else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (1e-3 * median_ms(lambda: target.copy_(source), device)[1])


def machine(device: str) -> dict:
    """What the numbers belong to."""
    facts = {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.processor()}
    if device == "cuda":
        import triton

        facts |= {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__, "cuda": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,driver_version", "--format=csv,noheader"]
        known = torch.version.cuda and shutil.which(query[0])
        done = subprocess.run(query, capture_output=True, text=True, check=False) if known else None
        facts["clocks and driver"] = done.stdout.strip() if done and done.returncode == 0 else "unknown"
    return facts


def variants(operation: str, device: str, extra) -> dict[str, Callable]:
    """Implementations by name; every one takes the list of all inputs."""
    if operation == "attention":

        def composed(t):
            return composed_attention(t[0], t[1], Weights(*t[2:]))

        def tested(impl):
            return lambda t: call_attention(t[0], t[1], Weights(*t[2:]), impl=impl)
    else:

        def composed(t):
            return composed_aggregation(t[: len(t) // 2], t[len(t) // 2 :], extra)

        def tested(impl):
            return lambda t: call_aggregation(t[: len(t) // 2], t[len(t) // 2 :], extra, impl=impl)

    found = {"composed": composed, "reference": tested("reference")}
    if device == "cuda":
        # Each shape compiles anew: past dynamo's recompile limit a "compiled" row would silently run eagerly.
        torch._dynamo.reset()
        found |= {
            "composed, compiled": torch.compile(composed, dynamic=False),
            "reference, compiled": torch.compile(tested("reference"), dynamic=False),
        }
        found["triton"] = tested("triton")
    return found


def gradients(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """Output and all gradients for a fixed upstream gradient."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def correctness(operation: str, make: Callable, device: str, extra) -> list[dict]:
    """Error against fp64 for each dtype and implementation: ≤ 2·(eager's error + eps·max|ref|)."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = make(dtype, False)
        functions = variants(operation, device, extra)
        exact = gradients(functions["composed"], [t.double() for t in inputs])
        eager = gradients(functions["composed"], inputs)
        name = "triton" if device == "cuda" else "reference"
        tested, again = gradients(functions[name], inputs), gradients(functions[name], inputs)
        worst = 0.0
        for a, b, truth in zip(tested, eager, exact, strict=True):
            bound = 2 * ((b.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max())
            worst = max(worst, ((a.double() - truth).abs().max() / bound).item())
        repeats = all(torch.equal(a, b) for a, b in zip(tested, again, strict=True))
        good = worst <= 1 and repeats
        row = {"operation": operation, "implementation": name, "dtype": str(dtype)[6:], "passed": good}
        rows.append(row | {"error over bound": round(worst, 3), "repeats bitwise": repeats})
    return rows


def timings(operation: str, name: str, make: Callable, traffic: dict, device: str, extra, peak: float) -> list[dict]:
    """Rows for every implementation, layout and direction at one shape."""
    rows, dtype = [], torch.bfloat16 if device == "cuda" else torch.float32
    for channels_last in (False, True):
        leaves = [t.requires_grad_() for t in make(dtype, channels_last)]
        for implementation, function in variants(operation, device, extra).items():
            out = function(leaves)
            upstream = torch.ones_like(out)
            runs = {
                "forward": lambda f=function, t=leaves: f([leaf.detach() for leaf in t]),
                "backward": lambda o=out, t=leaves, u=upstream: torch.autograd.grad(o, t, u, retain_graph=True),
                "both": lambda f=function, t=leaves, u=upstream: torch.autograd.grad(f(t), t, u),
            }
            for direction, run in runs.items():
                low, median, high = median_ms(run, device)
                moved, flops = traffic[direction]
                row = {"operation": operation, "shape": name, "layout": "channels_last" if channels_last else "NCHW"}
                row |= {"implementation": implementation, "direction": direction, "ms": median, "q20": low, "q80": high}
                row |= {"roofline %": 100 * moved / peak / (1e-3 * median), "FLOP/byte": flops / moved}
                row |= {"GFLOP/s": flops / median / 1e6}
                if device == "cuda" and direction == "both":
                    base = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    run()
                    row["peak MiB"] = (torch.cuda.max_memory_allocated() - base) / 2**20
                rows.append(row)
            del out
    return rows


def attention_job(shape, device):
    """Inputs, traffic and name of one shape of semantic attention."""

    def make(dtype, channels_last):
        heads = max(1, shape[1] // HEAD)
        x, p, w = attention_case(shape, PRIOR, heads, dtype=dtype, device=device, channels_last=channels_last)
        return [x, p, *w]

    itemsize = 2 if device == "cuda" else 4
    return make, attention_traffic(shape, itemsize), "×".join(map(str, shape))


def aggregation_job(shape, device):
    """Inputs, traffic and name of one shape of level aggregation: four levels from the target's size down."""
    batch, H, W = shape
    sizes = [(max(1, H >> i), max(1, W >> i)) for i in range(4)]

    def make(dtype, channels_last):
        options = {"dtype": dtype, "device": device, "channels_last": channels_last}
        values, logits = aggregation_case(batch, PRIOR, GROUPS, sizes, **options)
        return [*values, *logits]

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return make, aggregation_traffic(make(dtype, False), shape), "×".join(map(str, shape))


def report(results: dict) -> str:
    """Markdown: machine, correctness, and a table of forward + backward per shape."""
    lines = ["# Kernels", "", *(f"* {key}: {value}" for key, value in results["machine"].items())]
    lines += [f"* copy ceiling: {results['ceiling'] / 1e9:.0f} GB/s", "", "## Correctness", ""]
    lines += [
        "| operation | implementation | dtype | error over bound | repeats | passed |",
        "|---|---|---|---:|---|---|",
    ]
    for r in results["correctness"]:
        cells = [
            r[k] for k in ("operation", "implementation", "dtype", "error over bound", "repeats bitwise", "passed")
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "## Forward + backward", ""]
    if not all(row["passed"] for row in results["correctness"]):
        return "\n".join([*lines, "Correctness is red: no timing is reported."]) + "\n"
    lines += ["| operation | shape | layout | implementation | ms | × composed | roofline % | peak MiB |"]
    lines += ["|---|---|---|---|---:|---:|---:|---:|"]
    composed = {}
    for r in results["timings"]:
        if r["direction"] == "both":
            key = (r["operation"], r["shape"], r["layout"])
            composed.setdefault(key, r["ms"])
            memory = f"{r['peak MiB']:.0f}" if "peak MiB" in r else ""
            cells = [*key, r["implementation"], f"{r['ms']:.3f}", f"{composed[key] / r['ms']:.2f}"]
            lines.append("| " + " | ".join([*cells, f"{r['roofline %']:.0f}", memory]) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    """Roofline: GFLOP/s against FLOP/byte of every forward + backward, under the measured copy ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    rows = [r for r in results["timings"] if r["direction"] == "both"]
    for name in dict.fromkeys(r["implementation"] for r in rows):
        chosen = [r for r in rows if r["implementation"] == name]
        axes.scatter([r["FLOP/byte"] for r in chosen], [r["GFLOP/s"] for r in chosen], label=name, s=18)
    reach = sorted(r["FLOP/byte"] for r in rows)
    axes.plot(reach, [f * results["ceiling"] / 1e9 for f in reach], color="black", label="copy ceiling")
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte of the two-pass method", ylabel="GFLOP/s")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="one small shape an operation")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the JSON, the table and the plot")
    args = parser.parse_args()
    device = args.device
    attention = [(1, 64, 64, 64)] if args.quick else ATTENTION_SHAPES
    aggregation = [(1, 64, 64)] if args.quick else AGGREGATION_SHAPES
    results = {"machine": machine(device), "ceiling": ceiling(device), "correctness": [], "timings": []}
    jobs = [("attention", s, *attention_job(s, device)) for s in attention]
    jobs += [("aggregation", s, *aggregation_job(s, device)) for s in aggregation]
    # Every route that is timed: fused and tiled gradients, fused and GEMM Grams, odd and whole sizes.
    shapes = [(2, 96, 31, 33)] + ([] if device == "cpu" else [(2, 32, 32, 32), (2, 256, 16, 16), (2, 512, 17, 15)])
    small = [("attention", attention_job(shape, device), None) for shape in shapes]
    small += [("aggregation", aggregation_job((2, 33, 31), device), (33, 31))]
    for operation, (make, _, _), extra in small:
        results["correctness"] += correctness(operation, make, device, extra)
    passed = all(row["passed"] for row in results["correctness"])
    for operation, shape, make, traffic, name in jobs if passed else []:
        extra = tuple(shape[-2:])
        results["timings"] += timings(operation, name, make, traffic, device, extra, results["ceiling"])
        print(f"{operation} {name}: done", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"kernels-{results['machine'].get('gpu', 'cpu').lower().replace(' ', '-')}"
    (args.out / f"{stem}.json").write_text(json.dumps(results, indent=1))
    (args.out / f"{stem}.md").write_text(report(results))
    if passed:
        plot(results, args.out / f"{stem}.png")
    print(report(results))
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
