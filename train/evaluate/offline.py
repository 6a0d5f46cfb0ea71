"""Evaluate what training saved, without an engine."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from data.blur import TIERS
from data.stream.validation import validation_count, validation_pairs
from train.checkpoint.saved import describe, load_model, loss_state
from train.config.identity import git_commit
from train.config.sources import data_sources, open_set
from train.engine.precision import keep_depthwise_in_fp32
from train.evaluate.report import draw_panel, tier_lines, write_report
from train.evaluate.scores import VALIDATION_SEED, evaluate_pairs, panel_numbers
from train.objective.task import DeblurTask


def evaluate_saved(
    run: Path,
    *,
    data: str | None,
    out: Path | None,
    which: str,
    per_tier: int | None,
    crop: int | None,
    overwrite: bool,
    device: torch.device,
) -> None:
    """Score a saved model on a shard set's validation list and print the table; `out` gets report.md and panel.png.

    With the run's own data and settings this repeats the run's last evaluation. ValueError on a wrong path.
    """
    console = Console()
    if out is not None and (out / "report.md").exists() and not overwrite:
        raise ValueError(f"{out / 'report.md'}: exists: choose another folder, or --overwrite")
    network, config, folder = load_model(run, device, which)
    own = data_sources(config)[1]
    if data is None and own is None:
        raise ValueError(f"{run}: was trained without validation (eval: off): name a set with --data")
    source, val_set = data or str(own), open_set(data or own.path, config)
    crops, side = per_tier or config.eval.per_tier, crop or config.eval.crop
    measured = loss_state(folder) if config.model.prior else None
    task = None
    if measured:
        task = DeblurTask(config, device)
        task.load_state_dict(measured)
    bf16 = config.engine.precision == "bf16"
    keep_depthwise_in_fp32(network, config.engine, device)
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    with Progress(console=console, transient=True) as bar, autocast:
        row = bar.add_task("restoring", total=validation_count(val_set, TIERS, crops))
        evaluation = evaluate_pairs(
            network,
            validation_pairs(
                val_set, config.blur, crop=side, crops=crops, seed=VALIDATION_SEED, margin=config.data.margin
            ),
            device=device,
            teacher=task.teacher if task else None,
            similarity=task.similarity if task else None,
            keep=panel_numbers(config.eval.panels, val_set, crops),
            on_forward=lambda: bar.advance(row),
        )
    console.print(
        f"model: {folder} ({describe(folder)})  data: {source}", markup=False, highlight=False, soft_wrap=True
    )
    facts = {"model": f"{folder} ({describe(folder)})", "validation data": source, "crops": f"{side} px"}
    for line in tier_lines(evaluation):
        console.print(line, highlight=False, soft_wrap=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_panel(evaluation.pictures)).save(out / "panel.png")
        facts["commit"] = git_commit() or "not in git"
        write_report(out / "report.md", evaluation, title=f"Evaluation of {run}", facts=facts, before=[], curve=False)
        console.print(f"report: {out / 'report.md'}", markup=False, soft_wrap=True)
