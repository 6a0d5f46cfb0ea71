"""Launcher × ZeRO stage × precision × accumulation: the losses of each run against one process's, and its time.

python tests/studies/matrix.py                       # all 64 runs, about 20 s each on two cores; a Markdown table
python tests/studies/matrix.py --only torchrun,3     # those whose names hold all the words: torchrun-zero3-fp32-acc1 …

Two processes each (`python`: one), on a CPU by gloo. The reference of fp32 is one process in fp32, that of bf16 one
process in bf16, both without ZeRO and accumulation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.train.launchers import LAUNCHERS, finish, start

STEPS, DISTILL = 6, 2
# Largest difference of a loss (seen 5.9e-5 and 1.2e-3). bf16 keeps 8 bits: how a batch is split decides how sums inside
# it are rounded, by 2^-9 of a term; gradients then differ by as much, and the losses of the next steps too.
TOLERANCE = {"fp32": 1e-4, "bf16": 4e-3}


@dataclass(frozen=True)
class Cell:
    """One run of the matrix."""

    launcher: str
    zero: int
    precision: str
    accumulation: int

    @property
    def name(self) -> str:
        return f"{self.launcher}-zero{self.zero}-{self.precision}-acc{self.accumulation}"

    @property
    def settings(self) -> dict[str, object]:
        return {
            "engine.zero": self.zero,
            "engine.precision": self.precision,
            "train.accumulation": self.accumulation,
            "train.steps": STEPS,
            "train.distill_steps": DISTILL,
        }


def cells() -> list[Cell]:
    """The whole matrix."""
    return [Cell(*values) for values in itertools.product(LAUNCHERS, range(4), TOLERANCE, (1, 2))]


# Every value of every dimension at least once (`python` is the reference).
COVERING = [
    Cell("srun", 0, "fp32", 2),
    Cell("accelerate", 1, "bf16", 2),
    Cell("torchrun", 2, "bf16", 1),
    Cell("srun", 3, "bf16", 2),
]


def run(cell: Cell, root: Path, base: Sequence[str]) -> tuple[dict[int, float], float]:
    """(loss of every step, seconds) of a run below `root`. RuntimeError with the end of its output if it fails."""
    arguments = [*base, "--set", f"run.root={root}", "--set", f"run.name={cell.name}"]
    for key, value in cell.settings.items():
        arguments += ["--set", f"{key}={value}"]
    started = time.perf_counter()
    status, said = finish(start(cell.launcher, arguments))
    if status:
        raise RuntimeError(f"{cell.name}: status {status}\n{said[-3000:]}")
    records = [json.loads(line) for line in (root / cell.name / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    if sorted(losses) != list(range(1, STEPS + 1)):
        raise RuntimeError(f"{cell.name}: has the steps {sorted(losses)} instead of 1 to {STEPS}")
    return losses, time.perf_counter() - started


def difference(one: dict[int, float], other: dict[int, float]) -> float:
    """Largest difference over the steps."""
    return max(abs(one[step] - other[step]) for step in one)


def tiny_run(root: Path) -> list[str]:
    """Arguments of the tests' smallest run, with its data below `root`."""
    from tests.train.runs import TINY
    from tests.train.small_sets import small_set

    (root / "tiny.yaml").write_text("{}\n")
    values = TINY | {"data.train": small_set(root / "train", "train", 5), "data.val": small_set(root / "val", "val", 2)}
    values |= {"data.workers": 0, "checkpoint.every": STEPS}
    arguments = ["--config", str(root / "tiny.yaml")]
    for key, value in values.items():
        arguments += ["--set", f"{key}={value}"]
    return arguments


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words, separated by commas, that a run's name must hold")
    words = [word for word in parser.parse_args().only.split(",") if word]
    chosen = [cell for cell in cells() if all(word in cell.name for word in words)]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="sharpprior-matrix-") as folder:
        root = Path(folder)
        base = tiny_run(root)
        references = {
            precision: run(Cell("python", 0, precision, 1), root / "reference", base)[0]
            for precision in sorted({cell.precision for cell in chosen})
        }
        print("| launcher | processes | ZeRO | precision | accumulation | largest difference | allowed | seconds | |")
        print("|---|---|---|---|---|---|---|---|---|")
        for cell in chosen:
            try:
                losses, seconds = run(cell, root / "runs", base)
                gap = difference(references[cell.precision], losses)
                good, shown = gap <= TOLERANCE[cell.precision], f"{gap:.1e}"
            except RuntimeError as error:
                good, shown, seconds = False, "failed", 0.0
                print(error, file=sys.stderr)
            failed += not good
            processes = 1 if cell.launcher == "python" else 2
            print(
                f"| {cell.launcher} | {processes} | {cell.zero} | {cell.precision} | {cell.accumulation} | {shown} | "
                f"{TOLERANCE[cell.precision]:.0e} | {seconds:.0f} | {'ok' if good else 'FAILED'} |",
                flush=True,
            )
    print(f"\n{len(chosen) - failed} of {len(chosen)} runs agree with one process.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
