"""Memory of a run over its steps, loader workers included: starts a tiny run (or reads a trace), fits a line.

python tests/studies/memory_slope.py                       # 2,000 steps, about 10 minutes
python tests/studies/memory_slope.py --steps 800 --set features.cache=on
python tests/studies/memory_slope.py --trace runs/x/traces/rank-0.jsonl

Prints MiB per 1,000 steps after the first quarter, and ends with status 1 above the limit. The first 300 steps never
count: a loader worker grows by about 12 MiB in its first 200 batches (imports, kernels of every size, allocator) and by
about 1 MiB in the next thousand.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

LIMIT_MIB = 10.0  # per 1,000 steps; an allocator's noise is a few
WARM_UP = 300  # steps


def slopes(trace: Path) -> dict[str, float]:
    """MiB per 1,000 steps of each kind of memory, least squares after the first quarter, and the warm-up."""
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    first = max(WARM_UP, rows[-1]["step"] // 4)
    rows = [row for row in rows if row["step"] > first]
    if len(rows) < 2 or rows[-1]["step"] < first + WARM_UP:
        sys.exit(f"{trace}: a slope needs {2 * WARM_UP} steps at least")
    steps = np.array([row["step"] for row in rows], float)
    return {
        name: 1000 * float(np.polyfit(steps, [row[name] for row in rows], 1)[0])
        for name in rows[0]
        if name.startswith(("rss", "gpu"))
    }


def run(folder: Path, steps: int, settings: list[str]) -> Path:
    """Train a tiny network for so many steps; the trace of its rank."""
    from tests.train.runs import Runs

    runs = Runs(folder)
    process = runs.start(
        "flat",
        *(part for setting in settings for part in ("--set", setting)),
        train__steps=steps,
        data__workers=2,
        checkpoint__every=steps,
        eval__every=max(1, steps // 4),
    )
    _, error = process.communicate()
    if process.returncode:
        sys.exit(error)
    return runs.folder("flat") / "traces" / "rank-0.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--trace", type=Path, help="a trace that exists")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = args.trace or run(Path(folder), args.steps, args.set)
        found = slopes(trace)
        last = json.loads(trace.read_text().splitlines()[-1])
    for name, slope in found.items():
        print(f"{name}: {slope:+.2f} MiB per 1,000 steps, {last[name]:.0f} MiB at step {last['step']}")
    return int(max(found.values()) > LIMIT_MIB)


if __name__ == "__main__":
    sys.exit(main())
