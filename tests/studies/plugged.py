"""One distilled prior in other networks: the identity at the start, and the losses after, beside the bare networks.

python tests/studies/plugged.py PRIOR OUT [--steps 120] [--only nafnet …]     # a Markdown table, OUT/plugged.png

Each network trains twice with one seed: bare, and with the prior of the run (or file) PRIOR, frozen. The evaluations
before the first step must be equal to the bit, because a fresh embedding changes nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
NETWORKS = {
    "nafnet": "{name: nafnet, width: 16, enc_blk_nums: [1, 1, 1], middle_blk_num: 1, dec_blk_nums: [1, 1, 1]}",
    "mimounet": "{name: mimounet, num_res: 1}",
    "restormer": "{name: restormer, dim: 16, num_blocks: [1, 1, 1, 1], num_refinement_blocks: 1}",
}


def train(out: Path, name: str, steps: int, *arguments: str, **values: object) -> list[dict]:
    """One run; its records."""
    values = {
        "run.root": out, "run.name": name, "train.steps": steps, "train.distill_steps": 0, "data.crop": 128,
        "eval.crop": 128, "eval.every": 0, "checkpoint.every": steps, "loss.pixel": "psnr", "loss.frequency": 0,
    } | values  # fmt: skip
    command = [sys.executable, "train/main.py", "--config", "configs/small.yaml", *arguments]
    for key, value in values.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]


def scores(records: list[dict]) -> list[list[float]]:
    """Restored PSNR of every tier, of each evaluation."""
    return [[row["restored_psnr"] for row in record["tiers"]] for record in records if "tiers" in record]


def draw(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Running medians of the losses, a picture a network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, runs) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for label, losses in runs.items():
            half = max(1, len(losses) // 20)
            smooth = [np.median(losses[max(0, n - half) : n + half + 1]) for n in range(len(losses))]
            axes.plot(range(1, len(losses) + 1), smooth, label=label)
        axes.set(title=name, xlabel="step", ylabel="PSNR loss, running median")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prior", type=Path, help="run, checkpoint or exported prior")
    parser.add_argument("out", type=Path, help="folder for the runs (new)")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True)
    print("| network | at the start | loss, last tenth, bare | with the prior |\n|---|---|---:|---:|", flush=True)
    curves = {}
    for name in asked.only:
        backbone = {"model.backbone": NETWORKS[name]}
        bare = train(asked.out, f"{name}-bare", asked.steps, **backbone, **{"model.prior": "false"})
        with_it = train(asked.out, f"{name}-prior", asked.steps, "--prior", str(asked.prior), **backbone)
        first = [scores(records)[0] for records in (bare, with_it)]
        losses = {
            label: [record["loss"] for record in records if "loss" in record]
            for label, records in (("bare", bare), ("with the prior", with_it))
        }
        curves[name] = losses
        last = [np.mean(each[-max(1, len(each) // 10) :]) for each in losses.values()]
        same = "equal to the bit" if first[0] == first[1] else f"DIFFERENT: {first}"
        print(f"| {name} | {same} | {last[0]:.3f} | {last[1]:.3f} |", flush=True)
    draw(curves, asked.out / "plugged.png")


if __name__ == "__main__":
    main()
