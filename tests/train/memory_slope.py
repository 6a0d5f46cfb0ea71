"""Memory of a run over its steps, loader workers included: starts a tiny run (or reads a trace), fits a line.

python tests/train/memory_slope.py                       # 2,000 steps, about 10 minutes
python tests/train/memory_slope.py --steps 200
python tests/train/memory_slope.py --trace runs/x/traces/rank-0.jsonl

Prints MiB per 1,000 steps after the first quarter, and ends with status 1 above the limit.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

LIMIT_MIB = 10.0  # per 1,000 steps; an allocator's noise is a few


def slopes(trace: Path) -> dict[str, float]:
    """MiB per 1,000 steps of each kind of memory, least squares over the last three quarters of the records."""
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    rows = rows[len(rows) // 4 :]
    steps = np.array([row["step"] for row in rows], float)
    return {
        name: 1000 * float(np.polyfit(steps, [row[name] for row in rows], 1)[0])
        for name in rows[0]
        if name.startswith(("rss", "gpu"))
    }


def run(folder: Path, steps: int) -> Path:
    """Train a tiny network for so many steps; the trace of its rank."""
    from conftest import Runs

    runs = Runs(folder)
    process = runs.start(
        "flat", train__steps=steps, data__workers=2, checkpoint__every=steps, eval__every=max(1, steps // 4)
    )
    _, error = process.communicate()
    if process.returncode:
        sys.exit(error)
    return runs.folder("flat") / "traces" / "rank-0.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--trace", type=Path, help="a trace that exists")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = args.trace or run(Path(folder), args.steps)
        found = slopes(trace)
        last = json.loads(trace.read_text().splitlines()[-1])
    for name, slope in found.items():
        print(f"{name}: {slope:+.2f} MiB per 1,000 steps, {last[name]:.0f} MiB at step {last['step']}")
    return int(max(found.values()) > LIMIT_MIB)


if __name__ == "__main__":
    sys.exit(main())
