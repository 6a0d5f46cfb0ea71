"""Which shards a run reads, said out loud: the configuration's, `$SHARPPRIOR_DATA`'s, or the bundled photographs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from data.loader import PairLoader
from data.shards import ShardSet
from train import ROOT
from train.config import Config

VARIABLE = "SHARPPRIOR_DATA"
BUNDLED = ROOT / "data" / "samples"


@dataclass(frozen=True)
class Source:
    """A shard set's location and why it was chosen."""

    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.path} ({self.why})"


def data_sources(config: Config) -> tuple[Source, Source]:
    """(training, validation) shards: data.train and data.val where set, else `$SHARPPRIOR_DATA` (its train/ and val/
    where it has them, else itself for training), else the bundled photographs."""
    folder = os.environ.get(VARIABLE)
    train, val = (Source(str(BUNDLED / split), "bundled photographs") for split in ("train", "val"))
    if folder:
        inner = "://" not in folder and (Path(folder) / "train").is_dir()
        train = Source(str(Path(folder) / "train") if inner else folder, f"from {VARIABLE}")
        if "://" not in folder and (Path(folder) / "val").is_dir():
            val = Source(str(Path(folder) / "val"), f"from {VARIABLE}")
    if config.data.train is not None:
        train = Source(config.data.train, "from data.train")
    if config.data.val is not None:
        val = Source(config.data.val, "from data.val")
    return train, val


def pair_loader(
    config: Config,
    shards: ShardSet,
    *,
    start: int,
    batches: int | None,
    rank: int,
    world: int,
    pin_memory: bool = False,
) -> PairLoader:
    """The training stream of one rank from `start` samples consumed; nothing else decides its pairs."""
    data = config.data
    return PairLoader(
        shards,
        config.blur,
        crop=data.crop,
        global_batch=config.train.batch,
        seed=config.run.seed,
        start=start,
        batches=batches,
        rank=rank,
        world=world,
        accumulation=config.train.accumulation,
        workers=data.workers,
        window=data.window,
        crops_per_decode=data.crops_per_decode,
        boxes=data.boxes_per_photo,
        margin=data.margin,
        max_bad_fraction=data.max_bad_fraction,
        pin_memory=pin_memory,
    )
