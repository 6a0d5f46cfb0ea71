"""Compare ways of distilling the prior at equal budget: one run a way and seed, then a table of similarities.

python -m train.ablation --config configs/distill.yaml                      # four ways × three seeds
python -m train.ablation --config configs/distill.yaml --ways all --seeds 0 1 2 3 4
python -m train.ablation --config configs/distill.yaml --set train.steps=20 --set train.distill_steps=20

Runs are in ROOT/<way>-seed<N>; finished ones are not run again, a broken-off command goes on when given again. The
table, in Markdown, is printed and written to ROOT/ablation.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from train import ROOT
from train.config.file import load_config
from train.config.identity import deciding
from train.config.schema import Config
from train.config.sources import with_resolved_data
from train.run.folder import RunFolder

SAME = ("model.student.fusion=same_level", "loss.match=same_level")
NO_CONTEXT = ("loss.context=0",)

# What each way changes in the configuration; the seed, the data, the steps and all else are the same.
WAYS: dict[str, tuple[str, ...]] = {
    "cross-level": (),
    "cross-level-no-context": NO_CONTEXT,
    "same-level": SAME,
    "same-level-no-context": (*SAME, *NO_CONTEXT),
    "cosine": ("loss.match=cosine",),
    "attention": ("loss.match=attention",),
    "light": ("model.student.name=light", "optim.lr=2e-3"),
}
DEFAULT = ("cross-level", "cross-level-no-context", "same-level", "same-level-no-context")


def main(arguments: list[str]) -> None:
    args = _parse(arguments)
    results: dict[str, list[dict]] = {}
    for way in list(WAYS) if args.ways == ["all"] else args.ways:
        for seed in args.seeds:
            name = f"{way}-seed{seed}"
            settings = [*args.set, *WAYS[way], f"run.seed={seed}", f"run.root={args.root}", f"run.name={name}"]
            results.setdefault(way, []).append(_result(args.config, settings))
    text = table(results)
    (args.root / "ablation.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: per way, each level's similarity of the prior on the validation pairs, and in brackets by how much it
    is above the untouched teacher's on the blurry image in the same run, mean ± sample standard deviation over the
    seeds.
    results: last evaluations by way."""
    some = next(iter(results.values()))
    levels = range(len(some[0]["similarity"]))
    heads = [f"level {level + 1}, stride {4 * 2**level}" for level in levels]
    lines = ["| way | seeds | " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * len(levels)]
    for way, runs in results.items():
        cells = []
        for level in levels:
            prior, blurry = ([run[name][level] for run in runs] for name in ("similarity", "blurry_similarity"))
            above = _mean([a - b for a, b in zip(prior, blurry, strict=True)], sign="+")
            cells.append(f"{_mean(prior)} ({above})")
        lines.append(f"| {way} | {len(runs)} | " + " | ".join(cells) + " |")
    blurry = [_mean([run["blurry_similarity"][level] for run in some]) for level in levels]
    lines.append(f"| teacher on the blurry image | {len(some)} | " + " | ".join(blurry) + " |")
    return "\n".join(lines)


def _mean(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{spread}"


def _result(path: str, settings: list[str]) -> dict:
    """The last evaluation of a run, which is made or finished first where it is not there."""
    config = load_config(path, settings)
    if not config.model.prior:
        raise ValueError(f"{path}: model.prior is false: there is nothing to compare")
    if config.engine.precision == "auto":
        raise ValueError(f"{path}: engine.precision auto may choose otherwise in each run: set fp32 or bf16")
    if not config.eval.enabled:
        raise ValueError(f"{path}: eval is off: there is nothing to compare by")
    folder = RunFolder.of(config)
    found = _last(folder, config)
    if found is None:
        command = [sys.executable, str(ROOT / "train" / "main.py"), "--config", path, "--resume", "auto"]
        for setting in settings:
            command += ["--set", setting]
        status = subprocess.run(command, check=False).returncode
        found = _last(folder, config)
        if status or found is None:
            raise ValueError(f"{folder.path}: the run did not end (status {status}): see its log.txt; then start again")
    return found


def _last(folder: RunFolder, config: Config) -> dict | None:
    """The evaluation after the last step; ValueError where the folder holds a run with other settings."""
    if folder.config.is_file() and folder.started():
        wanted, there = deciding(with_resolved_data(config)), deciding(load_config(folder.config))
        if wanted != there:
            raise ValueError(f"{folder.path}: holds a run with other settings: choose another --root")
    done = [r for r in folder.read_metrics() if r["step"] == config.train.steps and r.get("similarity")]
    return done[-1] if done else None


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of a run that distills")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key in every run")
    ways = {"default": list(DEFAULT), "choices": [*WAYS, "all"], "help": f"of {', '.join(WAYS)}, or all"}
    parser.add_argument("--ways", nargs="+", metavar="WAY", **ways)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--root", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    return parser.parse_args(arguments)
