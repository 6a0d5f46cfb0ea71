"""What a run's weights and feature scales are before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from data.shards.set import ShardSet
from model.deblurrer import Deblurrer
from model.pretrained import load_pretrained
from train.checkpoint.plug import PARTS, plug_in
from train.checkpoint.saved import model_folder
from train.config.networks import build_model
from train.config.schema import Config
from train.config.sources import pair_loader
from train.engine.engine import Engine
from train.log import log
from train.objective.task import DeblurTask
from train.watch.heartbeat import beat


def first_weights(
    config: Config, engine: Engine, task: DeblurTask, sets: Sequence[ShardSet], init: str | None
) -> tuple[Deblurrer, dict[str, Any]]:
    """A fresh module, and where those of its parts come from that were plugged in; nothing here waits for other ranks.

    init: a run, checkpoint or exported model whose weights it starts from. ValueError where that cannot be.
    """
    plugged = [f"model.{part}_from" for part in PARTS if getattr(config.model, f"{part}_from") is not None]
    if init is not None and plugged:
        raise ValueError(f"--init gives all weights, {plugged[0]} some of them: leave one of them out")
    module = build_model(config).to(engine.device)
    folder = None if init is None else model_folder(init)
    if folder is not None:
        load_pretrained(module, folder)
        log.info("weights start from %s", folder)
    task.calibrate(module, _calibration_batches(config, sets))
    if folder is not None and module.prior is not None:
        load_pretrained(module, folder)  # with the scales that belong to these weights
    origins = plug_in(module, config)
    for part, origin in origins.items():
        log.info("%s taken from %s (digest %s)", part, origin["from"], origin["digest"])
    return module, origins


def _calibration_batches(config: Config, sets: Sequence[ShardSet]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The first pairs of the plan, whatever the number of ranks: the same on every rank."""
    single = config.model_copy(
        update={
            "data": config.data.model_copy(update={"workers": 0, "canonical_groups": 1}),
            "train": config.train.model_copy(update={"accumulation": 1, "batch": 8}),
        }
    )
    batches = config.loss.statistics_crops // single.train.batch
    for batch in pair_loader(single, sets, start=0, batches=batches, rank=0, world=1):
        beat("start")
        yield batch["blurry"], batch["sharp"]
