"""Both operations on the GPU at hand, each case in a process of its own; what was once wrong, as small as it goes.

Where there is no GPU one test runs a case on the CPU, so that the lane itself stays alive, and the others are skipped.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kernels.runtime import INTERPRETING

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
on_gpu = pytest.mark.skipif(INTERPRETING or not torch.cuda.is_available(), reason="no GPU here")
# Relative RMS of the worst result: what rounding of the storage dtype leaves, times five. float32: products of three
# tf32 and sums in another order than eager's.
RMS = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-5}
# (C, D, H, W): the shapes that were wrong on an H200 with small tiles (96·64, 80·64, 128·64, 64·128, 64·64, 128·128),
# the narrowest and the widest fused ones, the wide route, and odd sizes.
ATTENTION = (
    *((16, 32, 32, 32), (32, 32, 32, 32), (48, 64, 32, 32), (64, 64, 32, 32), (64, 128, 32, 32), (80, 64, 32, 32)),
    *(
        (96, 64, 31, 33),
        (128, 64, 32, 32),
        (128, 128, 32, 32),
        (192, 64, 16, 16),
        (256, 64, 17, 15),
        (256, 128, 16, 16),
    ),
)
AGGREGATION = ((64, 4, 33, 31), (64, 4, 32, 32), (32, 1, 16, 24))
LAYOUTS = ("NCHW", "channels_last")
CASES = [
    (operation, ",".join(map(str, sizes)), dtype, layout)
    for operation, shapes in (("attention", ATTENTION), ("aggregation", AGGREGATION))
    for sizes in shapes
    for dtype in RMS
    for layout in LAYOUTS
]
# Launches that were wrong there and are no longer chosen: run and recorded, never asserted.
ONCE_WRONG = (
    *(("96,64,31,33", "NCHW", "gradient:32:8"), ("64,128,32,32", "NCHW", "gradient:32:8")),
    *(("64,64,32,32", "NCHW", "gradient:32:8"), ("128,64,32,32", "NCHW", "gradient:16:8")),
    *(("128,64,32,32", "NCHW", "gradient:32:4"), ("128,64,32,32", "NCHW", "gradient:16:4")),
    *(("64,64,32,32", "NCHW", "gradient:32:4"), ("128,128,32,32", "channels_last", "gram:32:8")),
)


def run(*words: str) -> dict:
    """The row of one case, from a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "gpu_case.py"), *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"error": f"exit {done.returncode}: {done.stderr[-400:]}"}


def complaint(row: dict, dtype: str) -> str:
    """What is wrong with a row; empty if nothing."""
    if "error" in row:
        return row["error"]
    bound = {name: max(RMS[dtype], 3 * row["eager"][name]) for name in row["rms"]}
    worse = {name: error for name, error in row["rms"].items() if not error <= bound[name]}
    if worse:
        return f"relative RMS {worse} above {bound}"
    return "" if row["repeats"] else "a second run gave other bits"


@pytest.fixture(scope="module")
def rows():
    """Every case, started at once: a process spends most of its time importing and compiling."""
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    started: dict[tuple[str, ...], Future] = {case: pool.submit(run, *case) for case in CASES}
    yield started
    pool.shutdown(cancel_futures=True)


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_equals_fp64_and_repeats(rows, case):
    wrong = complaint(rows[case].result(), case[2])
    assert not wrong, wrong


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", ONCE_WRONG, ids=" ".join)
def test_what_once_was_wrong_is_recorded(case, record_property):
    sizes, layout, forced = case
    row = run("attention", sizes, "bfloat16", layout, forced)
    record_property("row", json.dumps(row))
    print(forced, complaint(row, "bfloat16") or "right on this GPU and compiler")


@pytest.mark.skipif(INTERPRETING, reason="the interpreter's lane has its own tests")
def test_a_case_in_its_own_process_is_judged():
    row = run("attention", "16,16,6,5", "float32", "channels_last", "--device", "cpu")
    assert not complaint(row, "float32")
    row["rms"]["dp"] = 0.6
    assert "dp" in complaint(row, "float32")
    assert "other bits" in complaint(row | {"rms": row["eager"], "repeats": False}, "float32")
    assert "exit" in complaint(run("attention", "16,16,6"), "float32")
