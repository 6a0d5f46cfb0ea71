"""Every network with the prior under every way to run it: what works, what it takes, and what the losses are.

python tests/studies/networks.py OUT                  # all, some minutes a network on two cores; a Markdown table
python tests/studies/networks.py OUT --only mprnet    # one

Small settings of each network, 3 steps of 4 pairs: two gloo ranks under ZeRO 0, 2 and 3, one with recomputed blocks,
each against one process's losses; then the trained model is exported and restores a photograph of an odd size.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from PIL import Image

from tests.model.models import SMALL
from tests.train.runs import ROOT, Runs

WAYS = {
    "plain": {"ranks": 1},
    "ZeRO 0, 2 ranks": {"ranks": 2},
    "ZeRO 2, 2 ranks": {"ranks": 2, "engine__zero": 2},
    "ZeRO 3, 2 ranks": {"ranks": 2, "engine__zero": 3},
    "recomputed": {"ranks": 1, "engine__checkpointing": "true"},
    "bf16": {"ranks": 1, "engine__precision": "bf16"},
}


def rows(runs: Runs, name: str) -> Iterator[tuple[str, str]]:
    """(way, what came of it) of one network."""
    settings = ", ".join(f"{key}: {list(v) if isinstance(v, tuple) else v}" for key, v in SMALL.get(name, {}).items())
    common = {
        "model__backbone": f"{{name: {name}{', ' + settings if settings else ''}}}",
        "model__spe": "{dim: 8, groups: 2, heads: 1}",
        "model__student": "{name: light, width: 8}",
        "train__steps": 3,
        "eval": "off",
        "checkpoint__every": 3,
    }
    first: dict[int, float] = {}
    for way, changes in WAYS.items():
        run, started = f"{name}-{way.replace(' ', '').replace(',', '-')}", time.perf_counter()
        try:
            runs.run(run, **common, **changes)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            yield way, " ".join(str(error).split())[-300:]
            continue
        losses = runs.losses(run)
        first = first or losses
        off = max(abs(losses[step] - first[step]) for step in first)
        yield way, f"losses within {off:.1e}, {time.perf_counter() - started:.0f} s"
    yield "export, restore 97×131", _restored(runs, f"{name}-plain")


def _restored(runs: Runs, run: str) -> str:
    photo, out, file = runs.root / "photo.png", runs.root / f"{run}.png", runs.root / f"{run}.safetensors"
    pixels = np.random.Generator(np.random.Philox(1)).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    for command in (["export", runs.folder(run), "-o", file], ["restore", file, photo, "-o", out]):
        done = subprocess.run(
            [sys.executable, "-m", "train.cli", *map(str, command)],
            cwd=ROOT, env=runs.environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            return done.stderr.strip()[-300:]
    with Image.open(out) as picture:
        return "works" if picture.size == (131, 97) else f"size {picture.size}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the runs (new)")
    parser.add_argument("--only", nargs="*", default=sorted([*SMALL, "unet"]))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True)
    runs = Runs(asked.out)
    print("| network | " + " | ".join([*WAYS, "export, restore 97×131"]) + " |")
    print("|---" * (len(WAYS) + 2) + "|", flush=True)
    for name in asked.only:
        print(f"| {name} | " + " | ".join(what for _, what in rows(runs, name)) + " |", flush=True)


if __name__ == "__main__":
    main()
