"""`--dry-run`: validate all that a run needs, count what it costs, show the plan; nothing is trained or written."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from data.blur import TIERS
from data.shards.set import ShardSet
from data.stream.crops import check_crop_fits
from data.stream.validation import validation_count
from model.encoder import EncoderSpec, build_encoder
from model.summary import summarize
from train.config.networks import build_model
from train.config.patches import check_crops_fit, dearest, in_phase, pairs_before, phases
from train.config.schema import Config
from train.config.sources import data_sources, open_sets, pair_loader
from train.engine.launch import world_size
from train.engine.precision import planned
from train.engine.settings import deepspeed_settings
from train.objective.task import DeblurTask
from train.plan.memory import memory_per_rank

BATCHES_SHOWN = 3


def dry_run(config: Config, ranks: int | None) -> None:
    """Print parameters, MACs, memory per rank, steps and the plan's first batches. ValueError on what would stop a run
    of `ranks` (default: the launcher's number) ranks, but for a run folder that exists, which is only said."""
    console = Console(width=None if Console().is_terminal else 200)
    if config.engine.precision == "auto":
        console.print("engine.precision auto: counted as bf16, a GPU's; on a CPU one rank measures, several take fp32")
        config = planned(config)
    world = world_size() if ranks is None else ranks
    if world < 1:
        raise ValueError(f"--ranks {world}: at least 1")
    micro = config.micro_batch(world)
    deepspeed_settings(config, world)
    sets, val_set = open_sets(config)
    check_crops_fit(config, sets)
    if val_set is not None:
        check_crop_fits(val_set, config.eval.crop, "eval.crop")
    _read_weights(config)
    with torch.device("meta"):
        network = build_model(config)
    size = (config.data.crop, config.data.crop)
    counts = summarize(network, size)
    _print_model(console, config, counts)
    most = in_phase(config, dearest(config))
    _print_memory(console, most, network, world, most.micro_batch(world))
    _print_run(console, config, world, micro, sets, val_set)
    _print_plan(console, config, sets, world)


def _read_weights(config: Config) -> None:
    """Build losses, teachers, and a student with weights of its own; ValueError where something is absent or unfit."""
    DeblurTask(config, torch.device("cpu"))
    student = config.model.student
    if config.model.prior and student.name is not None:
        build_encoder(EncoderSpec(student.name, student.weights, config.model.levels))


def _print_model(console: Console, config: Config, counts) -> None:
    table = Table("part", "parameters", "MACs", title=f"Model at {counts.size[0]}×{counts.size[1]} px, one image")
    for name, (parameters, macs) in counts.parts.items():
        table.add_row(name, f"{parameters / 1e6:.3f} M", f"{macs / 1e9:.3f} G")
    table.add_row("all", f"{counts.parameters / 1e6:.3f} M", f"{counts.macs / 1e9:.3f} G", style="bold")
    console.print(table)
    if config.model.prior:
        console.print(f"teacher: {config.model.teacher_names}, frozen, beside the engine")


def _print_memory(console: Console, config: Config, network, world: int, micro: int) -> None:
    table = Table(
        "what", "GiB", title=f"Memory per rank: {world} ranks, ZeRO {config.engine.zero}, micro-batch {micro}"
    )
    for name, size in memory_per_rank(config, network, world, micro).items():
        table.add_row(name, f"{size / 2**30:.3f}")
    console.print(table)


def _print_run(
    console: Console, config: Config, world: int, micro: int, sets: list[ShardSet], val_set: ShardSet | None
) -> None:
    train, val = data_sources(config)
    steps, pairs = config.train.steps, pairs_before(config, config.train.steps)
    folder = config.run.folder
    state = "exists: needs --resume auto or another run.name" if folder.exists() else "will be created"
    if not folder.exists() and not os.access(_existing_parent(folder), os.W_OK):
        raise ValueError(f"{folder}: cannot be created here: choose another with --set run.root=…")
    for source, shards in zip(train, sets, strict=True):
        console.print(f"training data: {source}, {len(shards)} samples in {len(shards.shards)} shards")
    if val_set is not None:
        console.print(f"validation data: {val}, {len(val_set)} samples")
    console.print(
        f"steps: {steps} ({config.train.distill_steps} distill), {config.train.batch} pairs each = {world} ranks × "
        f"{config.train.accumulation} accumulation × {micro}; {pairs:,} pairs, "
        f"{pairs / sum(map(len, sets)):.1f} epochs"
    )
    for phase in phases(config)[1:]:
        console.print(f"from step {phase.first}: {phase.batch} pairs each, crops of {phase.crop} px")
    pairs = validation_count(val_set, TIERS, config.eval.per_tier) if val_set is not None else 0
    scored = f"an evaluation: {pairs} pairs of {config.eval.crop} px" if pairs else "no validation: eval is off"
    console.print(f"{scored}; run folder: {folder} ({state})")


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _print_plan(console: Console, config: Config, sets: list[ShardSet], world: int) -> None:
    """The first global batches as the ranks will make them: decoded, blurred, counted."""
    single = config.model_copy(update={"data": config.data.model_copy(update={"workers": 0})})
    loaders = [
        iter(pair_loader(single, sets, start=0, batches=BATCHES_SHOWN, rank=rank, world=world))
        for rank in range(min(world, 2))
    ]
    heads = ("step", "rank", "sample", "box (top, left, px)", "tier", "extent, px", "input PSNR, dB")
    table = Table(*heads, title="The plan's first pairs")
    for step in range(BATCHES_SHOWN):
        for rank, loader in enumerate(loaders):
            batch = next(loader)
            top, left, side = batch["box"][0].tolist()
            place, blur = f"{top}, {left}, {side}", (batch["tier"][0], f"{batch['extent'][0]:.1f}")
            table.add_row(str(step), str(rank), batch["key"][0], place, *blur, f"{batch['input_psnr'][0]:.2f}")
            for _ in range(config.train.accumulation - 1):
                next(loader)
    console.print(table)
