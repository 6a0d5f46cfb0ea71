"""First script for a GPU: is every case right, and what do the operations cost? Rows into $OUT/one_check.jsonl.

    python -m tests.gpu.one_check [--seconds 240] [--dry]

Cases in processes of their own first (an illegal access ends a CUDA context), then launches that were once wrong
(recorded only), `python -m kernels.check` where that exists, then timings until the time is up.
"""

import importlib.util
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from kernels import bench
from tests.gpu.rows import ROOT, Rows, measured, process
from tests.kernels.test_on_gpu import CASES, ONCE_WRONG, complaint

# Shapes of the first runs, most telling first: where launches cost most, and where the maps are large.
ATTENTION = (
    (8, 64, 128, 128),
    (8, 256, 32, 32),
    (8, 128, 64, 64),
    (32, 64, 128, 128),
    (32, 128, 64, 64),
    (8, 32, 256, 256),
)
AGGREGATION = ((8, 128, 128), (8, 32, 32), (32, 64, 64))
START_S = 5.0  # less than a process takes to import torch and compile


def cases(rows: Rows, seconds: float) -> None:
    """Every case of tests/kernels/test_on_gpu.py and what was once wrong, as many at once as CPUs allow."""
    words = [("case", case) for case in CASES]
    words += [("once wrong", ("attention", sizes, "bfloat16", layout, forced)) for sizes, layout, forced in ONCE_WRONG]
    if rows.dry:
        words = [("case", ("attention", "16,16,6,5", dtype, "NCHW")) for dtype in ("float32", "bfloat16")]
        words = [(kind, (*case, "--device", "cpu")) for kind, case in words]
    end = rows.left() - seconds

    def one(kind: str, case: tuple[str, ...]) -> tuple[str, tuple[str, ...], int | None, str]:
        if (left := rows.left() - end) < START_S:
            return kind, case, None, ""
        command = [sys.executable, str(ROOT / "tests" / "kernels" / "gpu_case.py"), *case]
        return kind, case, *process(command, left, OMP_NUM_THREADS="1")

    with ThreadPoolExecutor(max_workers=min(12, os.cpu_count() or 1)) as pool:
        for future in as_completed([pool.submit(one, *word) for word in words]):
            kind, case, status, output = future.result()
            if status in (None, 124):
                rows.write(kind, case=" ".join(case), right=None, why="not run" if status is None else "not finished")
                continue
            found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            row = found[-1] if found else {"error": f"exit {status}: {output[-200:]}"}
            wrong = complaint(row, case[2])
            worst = max(row.get("rms", {"": float("nan")}).items(), key=lambda item: item[1])
            rows.write(kind, case=" ".join(case), right=not wrong, worst=worst, why=wrong[:300])


def guard(rows: Rows) -> None:
    """`python -m kernels.check`, its own words."""
    if importlib.util.find_spec("kernels.check") is None:
        rows.write("kernels.check", status="not in this checkout")
        return
    config = ["--config", "configs/quickstart.yaml" if rows.dry else "configs/large.yaml"]
    status, output = process([sys.executable, "-m", "kernels.check", *config], 10 if rows.dry else min(70, rows.left()))
    rows.write("kernels.check", status=status, output=output[-3000:])


def timings(rows: Rows) -> None:
    """Forward and backward of composed eager, compiled and ours: wall, GPU time, launches."""
    dtype = torch.float32 if rows.dry else torch.bfloat16
    jobs = [("attention", shape, *bench.attention_job(shape, rows.device)[::2]) for shape in ATTENTION]
    jobs += [("aggregation", shape, *bench.aggregation_job(shape, rows.device)[::2]) for shape in AGGREGATION]
    if rows.dry:
        jobs = [("attention", (1, 32, 8, 8), bench.attention_job((1, 32, 8, 8), "cpu")[0], "1×32×8×8")]
    for operation, shape, make, name in jobs:
        inputs = [t.requires_grad_() for t in make(dtype, True)]
        extra = tuple(shape[-2:])
        # Ours first, what it is compared with after: the time may be up in between.
        variants = bench.variants(operation, rows.device, extra)
        for variant, function in sorted(variants.items(), key=lambda item: item[0] != "triton"):
            if (variant == "reference" and not rows.dry) or variant == "reference, compiled":
                continue
            if rows.left() < 15:
                rows.write("timing", stopped=f"the time was up at {operation} {name}")
                return
            try:
                upstream = torch.ones_like(function(inputs))
                forward = measured(lambda f=function, t=inputs: f([leaf.detach() for leaf in t]), rows.device)
                both = measured(lambda f=function, t=inputs, u=upstream: torch.autograd.grad(f(t), t, u), rows.device)
                rows.write("timing", operation=operation, shape=name, variant=variant, forward=forward, both=both)
            except RuntimeError as error:
                rows.write("timing", operation=operation, shape=name, variant=variant, error=str(error)[:200])


def main() -> None:
    rows = Rows("one_check", __doc__)
    rows.machine()
    cases(rows, seconds=0.45 * rows.seconds)
    guard(rows)
    timings(rows)
    rows.write("end")


if __name__ == "__main__":
    main()
