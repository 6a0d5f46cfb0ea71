"""Which small network serves the quick start best: each trains for the same CPU time, without the prior.

python tests/studies/small_networks.py OUT [--seconds 150] [--seeds 2] [--only unet nafnet]     # a Markdown table

A short run says what a step costs in CPU time (of its processes, so that other work on the machine counts little); the
number of steps follows from it. Gains over the input are of the run's last evaluation on the bundled photographs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CANDIDATES = {
    "unet 16, patch 2 (of old)": "{name: unet, width: 16, blocks: [1, 1, 1, 2], patch: 2}",
    "unet 24, patch 4": "{name: unet, width: 24, blocks: [1, 1, 2], patch: 4}",
    "nafnet 16": "{name: nafnet, width: 16, enc_blk_nums: [1, 1, 1], middle_blk_num: 1, dec_blk_nums: [1, 1, 1]}",
    "nafnet 8": "{name: nafnet, width: 8, enc_blk_nums: [1, 1, 1, 2], middle_blk_num: 1, dec_blk_nums: [1, 1, 1, 1]}",
    "mimo-unet, 1 block": "{name: mimounet, num_res: 1}",
    "restormer 16": "{name: restormer, dim: 16, num_blocks: [1, 1, 1, 1], num_refinement_blocks: 1}",
    "uformer 8": "{name: uformer, embed_dim: 8, depths: [1, 1, 1, 1, 1, 1, 1, 1, 1]}",
}
TIMED = 6  # steps of the short run; its first is warming up


def train(out: Path, name: str, backbone: str, steps: int, seed: int, *, evaluate: bool) -> float:
    """One run; CPU seconds that its processes took."""
    values = {
        "run.root": out, "run.name": name, "run.seed": seed, "model.backbone": backbone, "model.prior": "false",
        "train.steps": steps, "train.distill_steps": 0, "eval.enabled": str(evaluate).lower(), "eval.every": 0,
        "eval.at_start": "false", "checkpoint.every": steps, "loss.pixel": "psnr", "loss.frequency": 0,
    }  # fmt: skip
    command = [sys.executable, "train/main.py", "--config", "configs/small.yaml"]
    for key, value in values.items():
        command += ["--set", f"{key}={value}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-1500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the runs (new)")
    parser.add_argument("--seconds", type=float, default=150.0, help="CPU time of a run's steps")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(CANDIDATES))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True)
    tiers = ("identity", "mild", "moderate", "severe", "extreme")
    print("| network | CPU s a step | steps | seed | " + " | ".join(tiers) + " |")
    print("|---|---:|---:|---:|" + "---:|" * len(tiers), flush=True)
    for number, name in enumerate(asked.only):
        short = [train(asked.out, f"{number}-time-{n}", CANDIDATES[name], n, 0, evaluate=False) for n in (1, TIMED + 1)]
        cost = (short[1] - short[0]) / TIMED
        steps = max(20, round(asked.seconds / cost))
        for seed in range(asked.seeds):
            run = f"{number}-seed-{seed}"
            train(asked.out, run, CANDIDATES[name], steps, seed, evaluate=True)
            records = [json.loads(line) for line in (asked.out / run / "metrics.jsonl").read_text().splitlines()]
            gains = {row["tier"]: row["gain"] for row in [r for r in records if "tiers" in r][-1]["tiers"]}
            cells = " | ".join(f"{gains[tier]:+.3f}" for tier in tiers)
            print(f"| {name} | {cost:.2f} | {steps} | {seed} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
