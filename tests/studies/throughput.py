"""Pairs a second of whole training runs, beside the same networks, losses and pairs in a plain PyTorch loop.

python tests/studies/throughput.py OUT --photos SHARDS [--steps 40] [--rounds 2] [--only none frozen]   # Markdown

Each arm trains by train/main.py and, in turn with it, by the loop of this file: a map-style data set that decodes a
photograph and blurs a crop of it for every item, torch's DataLoader with as many workers, AdamW, clipped gradients; no
DeepSpeed, checkpoints, records, cache or plan. Rates are medians over steps, the first eight left out. `cached` finds
the teacher's features of all crops in the node's cache: a run before has written them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
WARMING = 8  # steps
COMMON = {
    "model.backbone": "{name: unet, width: 24, blocks: [1, 1, 2], patch: 4}", "model.student": "{width: 64}",
    "data.crop": 128, "train.batch": 8, "train.distill_steps": 0, "train.ema": 0.99, "loss.pixel": "psnr",
    "loss.frequency": 0, "eval.enabled": "false", "checkpoint.every": 100000,
}  # fmt: skip
ARMS = {
    "none": {"model.prior": "false"},
    "frozen": {"train.student_frozen": "true"},
    "along": {"loss.cfl": 0.1},
    "along, cached": {"loss.cfl": 0.1, "features.cache": "auto", "data.boxes_per_photo": 1},
}
PARTS = ("data", "teacher", "student", "fusion", "spe", "backbone", "backward", "update", "rest")


def settings_of(arm: str, photos: Path, out: Path, name: str, steps: int) -> list[str]:
    """`key=value` of a run."""
    values = COMMON | {"data.train": photos, "run.root": out, "run.name": name, "train.steps": steps} | ARMS[arm]
    if "features.cache" in ARMS[arm]:
        values["features.folder"] = out / "cache"
    return [f"{key}={value}" for key, value in values.items()]


def ours(settings: list[str], folder: Path) -> tuple[float, dict[str, float]]:
    """(pairs a second, mean shares of a step by part) of a run by train/main.py."""
    command = [sys.executable, "train/main.py", "--config", "configs/small.yaml"]
    command += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr[-1500:]}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "pairs_per_s" in record and record["step"] > WARMING]
    shares = {part: statistics.fmean(s["shares"].get(part, 0.0) for s in steps if "shares" in s) for part in PARTS}
    return statistics.median(step["pairs_per_s"] for step in steps), shares


def plain(settings: list[str]) -> float:
    """Pairs a second of the plain loop, in a process of its own."""
    command = [sys.executable, __file__, "--plain", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-1500:])
    return float(done.stdout.split()[-1])


def plain_loop(settings: list[str]) -> None:
    """Train as many of us would begin, and print the pairs a second."""
    sys.path.insert(0, str(ROOT))
    import torch
    from torch.utils.data import DataLoader

    from train.config.file import load_config
    from train.config.networks import build_model
    from train.config.sources import open_sets
    from train.objective.task import DeblurTask

    config = load_config(ROOT / "configs/small.yaml", settings)
    torch.manual_seed(config.run.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task, module = DeblurTask(config, device), build_model(config).to(device)
    pairs = Pairs(open_sets(config)[0][0], config.data.crop, config.blur)
    how = {"shuffle": True, "drop_last": True, "num_workers": config.data.workers, "persistent_workers": True}
    batches = DataLoader(pairs, config.train.batch, **how)
    task.calibrate(module, ((batch["blurry"], batch["sharp"]) for batch, _ in zip(batches, range(4), strict=False)))
    if config.student_rests:
        module.prior.rest()
    if len(pairs) < config.train.batch:
        raise SystemExit(f"{len(pairs)} photographs are fewer than a batch")
    learning = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, config.optim.lr)
    weight = 0.0 if config.student_rests else None
    seconds, started = [], time.perf_counter()
    while len(seconds) < config.train.steps:
        for batch in batches:
            loss, _ = task.losses(module, batch, distill=False, autocast=contextlib.nullcontext(), cfl=weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            loss.item()
            now = time.perf_counter()
            seconds.append(now - started)
            started = now
            if len(seconds) == config.train.steps:
                break
    print(config.train.batch / statistics.median(seconds[WARMING:]))


class Pairs:
    """Item n: photograph n with a crop of it, blurred anew; uint8 [3, S, S] each, and the extent in px."""

    def __init__(self, photographs, crop: int, blur) -> None:
        self._photographs, self._crop, self._blur = photographs, crop, blur

    def __len__(self) -> int:
        return len(self._photographs)

    def __getitem__(self, number: int) -> dict:
        import numpy as np
        import torch

        from data.blur import synthesize_pair
        from data.image import decode_image

        rng = np.random.default_rng(torch.randint(2**62, ()).item())
        shards = self._photographs
        image = decode_image(shards.read(number, shards.image_member(number)), shards.name(number))
        top, left = (int(rng.integers(side - self._crop + 1)) for side in image.shape[:2])
        pair = synthesize_pair(image, (top, left, self._crop), rng, self._blur, flip=bool(rng.random() < 0.5))
        both = {"blurry": pair.blurry, "sharp": pair.sharp}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1))) for name, x in both.items()}
        return tensors | {"extent": torch.tensor(pair.meta["extent"], dtype=torch.float32)}


def main() -> None:
    if sys.argv[1:2] == ["--plain"]:
        return plain_loop(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the runs (new)")
    parser.add_argument("--photos", type=Path, required=True, help="shard set to train on")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2, help="each arm trains so often by both, in turn")
    parser.add_argument("--only", nargs="*", default=list(ARMS), choices=list(ARMS))
    asked = parser.parse_args()
    out = asked.out.absolute()
    out.mkdir(parents=True)
    print("| arm | pairs/s | plain loop | ratio by round | " + " | ".join(f"{part} %" for part in PARTS) + " |")
    print("|---|---:|---:|---|" + "---:|" * len(PARTS), flush=True)
    for number, arm in enumerate(asked.only):
        rates, shares = [], []
        first = -1 if "features.cache" in ARMS[arm] else 0  # one more, which fills the cache
        for turn in range(first, asked.rounds):
            name = f"{number}-{turn}"
            settings = settings_of(arm, asked.photos.absolute(), out, name, asked.steps)
            rate, found = ours(settings, out / name)
            if turn >= 0:
                rates.append((rate, plain(settings)))
                shares.append(found)
        mine, theirs = (statistics.fmean(each) for each in zip(*rates, strict=True))
        ratios = ", ".join(f"{a / b:.2f}" for a, b in rates)
        cells = " | ".join(f"{100 * statistics.fmean(s[part] for s in shares):.0f}" for part in PARTS)
        print(f"| {arm} | {mine:.1f} | {theirs:.1f} | {ratios} | {cells} |", flush=True)
    return None


if __name__ == "__main__":
    main()
