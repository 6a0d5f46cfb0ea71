"""One case of one operation in this process, against fp64 on the same GPU, twice: prints one JSON line.

    python tests/kernels/gpu_case.py attention C,D,H,W bfloat16 channels_last [kernel:BLOCK_N:warps]
    python tests/kernels/gpu_case.py aggregation D,G,H,W float32 NCHW

An illegal access ends a CUDA context, so every case has a process of its own. `--device cpu` tries the plumbing with
the reference implementation.
"""

import argparse
import json

import torch

from kernels.aggregation.reference import composed_aggregation
from kernels.attention.algebra import Weights
from kernels.attention.reference import composed_attention
from kernels.cases import aggregation_case, attention_case, call_aggregation, call_attention

HEAD = 32


def force(text: str) -> None:
    """Replaces the launch table's row of one kernel: for launches that are known to be wrong."""
    from kernels.attention import configs, triton_backward, triton_forward

    name, pixels, warps = text.split(":")
    chosen, fused = configs.launch_config, configs.fused

    def forced(kernel: str, *sizes) -> dict[str, int]:
        return {"BLOCK_N": int(pixels), "num_warps": int(warps)} if kernel == name else chosen(kernel, *sizes)

    for module in (triton_forward, triton_backward):
        module.launch_config = forced
        module.fused = lambda kernel, *sizes: kernel == name or fused(kernel, *sizes)


def functions(operation: str, sizes: list[int], dtype: torch.dtype, channels_last: bool, device: str):
    """(inputs, operation under test, oracle, names of results)."""
    options = {"dtype": dtype, "device": device, "channels_last": channels_last}
    impl = "triton" if device == "cuda" else "reference"
    if operation == "attention":
        C, D, H, W = sizes
        x, p, weights = attention_case((2, C, H, W), D, max(1, C // HEAD), **options)
        return (
            [x, p, *weights],
            lambda t: call_attention(t[0], t[1], Weights(*t[2:]), impl=impl),
            lambda t: composed_attention(t[0], t[1], Weights(*t[2:])),
            ["y", "dx", "dp", *(f"d{field}" for field in Weights._fields)],
        )
    D, G, H, W = sizes
    levels = [(max(1, H >> i), max(1, W >> i)) for i in range(4)]
    values, logits = aggregation_case(2, D, G, levels, **options)
    return (
        [*values, *logits],
        lambda t: call_aggregation(t[:4], t[4:], (H, W), impl=impl),
        lambda t: composed_aggregation(t[:4], t[4:], (H, W)),
        ["P", *(f"dV{i}" for i in range(4)), *(f"da{i}" for i in range(4))],
    )


def results(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and the gradients of all inputs for one upstream gradient."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def measure(operation: str, sizes: list[int], dtype: torch.dtype, channels_last: bool, device: str) -> dict:
    """Relative RMS errors by result of ours and of eager in the same dtype, and whether ours repeats bit for bit."""
    inputs, ours, oracle, names = functions(operation, sizes, dtype, channels_last, device)
    exact = results(oracle, [t.double() for t in inputs])
    eager, first, second = results(oracle, inputs), results(ours, inputs), results(ours, inputs)

    def rms(values: list[torch.Tensor]) -> dict[str, float]:
        pairs = zip(names, values, exact, strict=True)
        return {n: float(((v.double() - e).norm() / e.norm().clamp_min(1e-300)).item()) for n, v, e in pairs}

    repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return {"rms": rms(first), "eager": rms(eager), "repeats": repeats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operation", choices=["attention", "aggregation"])
    parser.add_argument("sizes", help="C,D,H,W or D,G,H,W")
    parser.add_argument("dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("layout", choices=["NCHW", "channels_last"])
    parser.add_argument("forced", nargs="?", help="kernel:BLOCK_N:warps in place of the table's row")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    if args.forced:
        force(args.forced)
    sizes = [int(size) for size in args.sizes.split(",")]
    row = {"case": [args.operation, args.sizes, args.dtype, args.layout, args.forced]}
    try:
        row |= measure(args.operation, sizes, getattr(torch, args.dtype), args.layout == "channels_last", args.device)
    except RuntimeError as error:  # the CUDA context is gone with it: this process has nothing more to say
        row["error"] = str(error).splitlines()[0][:160]
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
