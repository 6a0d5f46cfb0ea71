"""`sharpprior plan`: print what a run costs on a cluster, with the assumptions it rests on."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from data.feature_cache.spec import CacheSpec
from data.shards.set import ShardSet
from model.encoder import build_encoder, teacher_specs
from model.summary import summarize
from train.config.networks import build_model
from train.config.patches import dearest, in_phase, pairs_before
from train.config.schema import Config
from train.config.sources import open_sets
from train.engine.precision import planned
from train.objective.task import check_loss
from train.plan.cost import (
    SPREAD,
    Cluster,
    Stage,
    best_stage,
    checkpoint_bytes,
    collectives,
    gradients_of,
    loader_need,
    operators_of,
    step_time,
    step_work,
    with_stage,
)
from train.plan.memory import memory_per_rank

MANY_TURNS = 10_000  # visits of a photograph beyond which it is hardly what was meant
ON_DEVICE = "sum on the device"
USABLE = 0.9  # of a GPU's memory: the rest is the allocator's slack, kernels' scratch space and NCCL's buffers


def stages_of(config: Config, cluster: Cluster) -> list[Stage]:
    """Every ZeRO stage that the configuration's other settings allow, on the cluster. ValueError if the batch does not
    divide by its ranks."""
    micro = config.micro_batch(cluster.world)
    with torch.device("meta"):
        network = build_model(config)
        teachers = [build_encoder(spec, read=False) for spec in teacher_specs(config.model)] if config.taught else []
    crop = config.data.crop
    counted = [(summarize(each, (crop, crop)).macs, operators_of(each, crop)) for each in (network, *teachers)]
    (macs, operators), of_teachers = counted[0], counted[1:]
    gradients, stages = gradients_of(network), []
    fixed = 4 * sum(tensor.numel() for each in teachers for tensor in each.state_dict().values())
    for zero in allowed_stages(config):
        staged = with_stage(config, zero)
        sizes = memory_per_rank(staged, network, cluster.world, micro)
        memory = sizes[ON_DEVICE] + fixed
        moved = collectives(staged, gradients, zero)
        fits = memory <= USABLE * cluster.memory * 2**30
        taught, launched = (sum(each[n] for each in of_teachers) for n in (0, 1))
        updated = gradients.count / (cluster.world if zero else 1)  # the optimizer's part of a rank
        work = step_work(staged, micro, macs, taught, sizes["activations"], operators, launched)
        stages.append(Stage(zero, memory, fits, moved, step_time(cluster, work, moved, updated)))
    return stages


def allowed_stages(config: Config) -> list[int]:
    """ZeRO stages that go with the precision and offloading of the configuration."""
    engine = config.engine
    if engine.offload_parameters != "none":
        return [3]
    return [1, 2, 3] if engine.precision in ("bf16_params", "fp16") or engine.offload != "none" else [0, 1, 2, 3]


def print_plan(config: Config, cluster: Cluster, console: Console) -> None:
    """Print the plan of a configuration on a cluster."""
    check_loss(config)
    precision = "bf16 (auto)" if config.engine.precision == "auto" else config.engine.precision
    config = _divisible(planned(config), cluster, console)
    pairs = pairs_before(config, config.train.steps)
    if config.train.progressive:
        phase = dearest(config)
        config = in_phase(config, phase)
        console.print(
            f"Progressive patches: planned for the dearest steps, {phase.first} to {phase.last}, of {phase.batch} "
            f"pairs with crops of {phase.crop} px; hours of all steps are at most those said."
        )
    stages = stages_of(config, cluster)
    chosen = next((stage for stage in stages if stage.zero == config.engine.zero), stages[0])
    micro = config.micro_batch(cluster.world)
    console.print(
        f"{cluster.nodes} nodes × {cluster.gpus} GPUs = {cluster.world} ranks; {config.train.batch} pairs a step = "
        f"{cluster.world} × {config.train.accumulation} accumulation × {micro}; {precision}"
    )
    _print_stages(console, cluster, stages, config.engine.zero)
    _print_advice(console, cluster, stages, config)
    sets, _ = open_sets(config)
    _print_loader(console, config, cluster, chosen, sets, pairs)
    _print_checkpoint(console, config, cluster, chosen)
    if config.engine.offload != "none" or config.engine.offload_parameters != "none":
        console.print("Offloading: traffic to host memory and the update on the CPU are not in the step's time.")
    _print_assumptions(console, cluster)


def _divisible(config: Config, cluster: Cluster, console: Console) -> Config:
    """The configuration with a batch that the cluster's ranks can share; says so where that is another one."""
    given, parts = config.train.batch, cluster.world * config.train.accumulation
    if given % parts == 0:
        return config
    batch = -(-given // parts) * parts
    console.print(
        f"train.batch {given} does not divide among {cluster.world} ranks × {config.train.accumulation} accumulation "
        f"steps, so no run would start: planned with {batch} instead; --set train.batch=… plans another multiple of "
        f"{parts}.",
        style="yellow",
    )
    return config.model_copy(update={"train": config.train.model_copy(update={"batch": batch})})


def _print_stages(console: Console, cluster: Cluster, stages: list[Stage], configured: int) -> None:
    rows = []
    for stage in stages:
        moved = ", ".join(f"{each.op} of {each.what} {each.payload / 1e6:.1f}" for each in stage.moved)
        row = {
            "ZeRO": f"{stage.zero}{' (configured)' if stage.zero == configured else ''}",
            "memory a rank, GiB": f"{stage.memory / 2**30:.2f}" + ("" if stage.fits else " (too much)"),
            "collectives a step (payload, MB)": moved if cluster.world > 1 else "none: one rank",
            "sent a rank and step, MB": f"{sum(each.wire(cluster.world) for each in stage.moved) / 1e6:.1f}",
            "compute, ms": f"{stage.step.compute * 1e3:.1f}",
            "communication, ms": f"{stage.step.communication * 1e3:.1f}",
            "update, ms": f"{stage.step.update * 1e3:.1f}",
            "waiting, ms": f"{stage.step.wait * 1e3:.1f}",
            "step, ms": f"{stage.step.total * 1e3:.1f}",
            "computing": f"{stage.step.efficiency:.0%}",
        }
        rows.append(row)
    table = Table(*rows[0], title="An optimizer step")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def _print_advice(console: Console, cluster: Cluster, stages: list[Stage], config: Config) -> None:
    best = best_stage(stages)
    if best is None:
        least = min(stages, key=lambda stage: stage.memory)
        console.print(
            f"No stage fits into {USABLE:.0%} of {cluster.memory:g} GiB; the least is ZeRO {least.zero} with "
            f"{least.memory / 2**30:.1f} GiB: raise train.accumulation, set engine.checkpointing, or offload."
        )
        return
    steps = config.train.steps * best.step.total / 3600
    console.print(
        f"Take ZeRO {best.zero}: the fastest that fits; {config.train.steps} steps are about {steps:.1f} hours."
    )


def _print_loader(
    console: Console, config: Config, cluster: Cluster, stage: Stage, sets: list[ShardSet], pairs: int
) -> None:
    samples = sum(map(len, sets))
    turns = pairs / samples
    if turns > MANY_TURNS:
        console.print(
            f"{config.train.steps:,} steps of {config.train.batch} pairs see each of the {samples} photographs "
            f"{turns:,.0f} times: is this the data that the run is meant for? (data.train, SHARPPRIOR_DATA)",
            style="yellow",
        )
    size = sum(shard.bytes for shards in sets for shard in shards.shards) / samples
    need = loader_need(config, cluster, stage.step, size)
    console.print(
        f"Loader, a node: {need.pairs:.0f} pairs/s; {need.megabytes:.1f} MB/s from shards of {size / 1e3:.0f} kB a "
        f"photograph; about {need.cores:.0f} cores for decoding and blur ({need.cores / cluster.gpus:.1f} a GPU)."
    )
    groups = config.data.canonical_groups
    if cluster.nodes > 1 and groups % cluster.nodes:
        more = min(map(len, sets)) >= cluster.nodes  # a group holds a photograph at least
        console.print(
            f"data.canonical_groups is {groups}: every node reads all {samples} photographs and caches them on its own"
            + (
                f"; with a multiple of {cluster.nodes} each reads its part. It is part of the order: choose it once."
                if more
                else f"; they are too few to be divided among {cluster.nodes} nodes."
            )
        )
    if config.model.prior and config.features.cache != "off":
        nodes = cluster.nodes if groups % cluster.nodes == 0 else 1
        record = cache_record_bytes(config)
        crops = samples * config.data.boxes_per_photo
        console.print(
            f"Feature cache, a node: {crops / nodes:,.0f} crops of {record / 1e6:.2f} MB = "
            f"{crops / nodes * record / 1e9:.1f} GB when full; reading it at this speed is "
            f"{need.pairs * record / 1e6:.0f} MB/s. First hits after {config.data.boxes_per_photo} visits of a "
            "photograph (data.boxes_per_photo)."
        )


def cache_record_bytes(config: Config) -> int:
    """Bytes of a crop's record in the feature cache."""
    with torch.device("meta"):
        encoders = [build_encoder(spec, read=False) for spec in teacher_specs(config.model)]
    levels = tuple(
        (sum(each.channels[level] for each in encoders), *(2 * [-(-config.data.crop // stride)]))
        for level, stride in enumerate(encoders[0].strides)
    )
    return CacheSpec("", levels, {}, config.features.dtype).record_bytes


def _print_checkpoint(console: Console, config: Config, cluster: Cluster, stage: Stage) -> None:
    with torch.device("meta"):
        network = build_model(config)
    size = checkpoint_bytes(network)
    seconds = size / (cluster.storage * 1e9)
    share = seconds / (config.checkpoint.every * stage.step.total + seconds)
    console.print(
        f"Checkpoint: {size / 2**30:.2f} GiB, {seconds:.1f} s at {cluster.storage:g} GB/s; every "
        f"{config.checkpoint.every} steps that is {share:.1%} of the time; {config.checkpoint.keep} kept: "
        f"{size * (config.checkpoint.keep + 1) / 2**30:.1f} GiB with the best."
    )


def _print_assumptions(console: Console, cluster: Cluster) -> None:
    console.print(
        f"Assumed: {cluster.tflops:g} TFLOPS a GPU, used to {cluster.utilisation:.0%}; {cluster.hbm:g} GB/s of GPU "
        f"memory; {cluster.launch:g} us a launch; {cluster.nvlink:g} GB/s a GPU in a node and {cluster.network:g} GB/s "
        f"a node between nodes, {cluster.latency:g} us a collective, nothing overlapped: a ring at {cluster.bus:g} "
        f"GB/s. Ranks' steps spread by {SPREAD:.0%}, so that the slowest is waited for. None of it was measured here: "
        "time a step on one GPU and set --utilisation and --launch to fit."
    )
