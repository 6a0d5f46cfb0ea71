"""Stands in for `accelerate` where the commands of a page are tried: the same training run, small enough for a test."""

import os
import sys

SMALL = {
    "data.crop": 64, "data.workers": 0, "data.margin": 16, "data.boxes_per_photo": 4, "train.batch": 2,
    "train.steps": 4, "optim.warmup": 1, "eval.crop": 64, "eval.every": 0, "eval.at_start": "false",
    "eval.per_tier": 1, "engine.cpu_threads": 1, "checkpoint.every": 2, "engine.zero": 0, "engine.precision": "fp32",
    "train.progressive": "[]",
}  # fmt: skip
STAGES = {"quickstart": {"train.distill_steps": 2}, "distill": {"train.distill_steps": 4}}


def main(arguments: list[str]) -> None:
    assert arguments[:2] == ["launch", "train/main.py"], arguments
    config = arguments[arguments.index("--config") + 1]
    values = SMALL | next((more for name, more in STAGES.items() if f"{name}.yaml" in config), {})
    if any(each.startswith("train.spe_steps=") for each in arguments):
        values["train.spe_steps"] = 2
    for key, value in values.items():
        arguments += ["--set", f"{key}={value}"]
    os.execv(sys.executable, [sys.executable, *arguments[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
