"""Which shards a run reads, said out loud: the configuration's, `$SHARPPRIOR_DATA`'s, or the bundled photographs."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.files import own_folder
from data.shards.remote import ShardCache
from data.shards.set import ShardSet
from data.stream.loader import PairLoader
from train import ROOT
from train.config.schema import Config, SourceSection

VARIABLE = "SHARPPRIOR_DATA"
BUNDLED = ROOT / "data" / "samples"


@dataclass(frozen=True)
class Source:
    """A shard set's location, why it was chosen, and its share of the pairs relative to the others'."""

    path: str
    why: str
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.path} ({self.why})"


def data_sources(config: Config) -> tuple[list[Source], Source | None]:
    """(training, validation) shards: data.train and data.val where set, else `$SHARPPRIOR_DATA` (its train/ and val/
    where it has them, else itself for training), else the bundled photographs. Under `eval: off` the latter is None."""
    folder = os.environ.get(VARIABLE)
    bundled, val = (Source(str(BUNDLED / split), "bundled photographs") for split in ("train", "val"))
    train = [bundled]
    if folder:
        inner = "://" not in folder and (Path(folder) / "train").is_dir()
        train = [Source(str(Path(folder) / "train") if inner else folder, f"from {VARIABLE}")]
        if "://" not in folder and (Path(folder) / "val").is_dir():
            val = Source(str(Path(folder) / "val"), f"from {VARIABLE}")
    if config.data.train is not None:
        several = len(config.data.train) > 1
        train = [
            Source(each.path, f"from data.train, weight {each.weight:g}" if several else "from data.train", each.weight)
            for each in config.data.train
        ]
        if not train:
            raise ValueError("data.train: the list of sources is empty: name at least one")
    if config.data.val is not None:
        val = Source(config.data.val, "from data.val")
    return train, val if config.eval.enabled else None


def with_resolved_data(config: Config) -> Config:
    """The configuration with the data that it reads named in it; local paths are absolute."""
    train, val = data_sources(config)
    named = {
        "train": [SourceSection(path=_absolute(source.path), weight=source.weight) for source in train],
        "val": _absolute(val.path) if val is not None else config.data.val,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=named)})


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def open_set(path: str, config: Config, *, check: bool = True) -> ShardSet:
    """A shard set, local or remote; shards of a remote one are kept in the node's cache. DataError if unusable."""
    if "://" not in path:
        return ShardSet(path, check=check)
    shared = Path(tempfile.gettempdir()) / f"sharpprior-shards-{os.getuid()}"
    folder = config.data.cache.folder or own_folder(shared, "data.cache.folder")
    return ShardSet(path, cache=ShardCache(folder, int(config.data.cache.limit_gib * 2**30)), check=check)


def open_sets(config: Config) -> tuple[list[ShardSet], ShardSet | None]:
    """The opened training and validation sets of a run; the latter None under `eval: off`."""
    train, val = data_sources(config)
    check = config.data.max_bad_fraction == 0
    validation = open_set(val.path, config, check=check) if val is not None else None
    return [open_set(source.path, config, check=check) for source in train], validation


def digest_of(sets: Sequence[ShardSet]) -> str:
    """One digest for the indices of all sets, in their order."""
    if len(sets) == 1:
        return sets[0].digest
    return hashlib.sha256("".join(each.digest for each in sets).encode()).hexdigest()


def pair_loader(
    config: Config,
    sets: Sequence[ShardSet],
    *,
    start: int,
    batches: int | None,
    rank: int,
    world: int,
    pin_memory: bool = False,
    device: torch.device | None = None,
    attach: Callable[[dict], None] | None = None,
) -> PairLoader:
    """The training stream of one rank from `start` samples consumed; nothing else decides its pairs.

    attach looks up what a batch needs beside its pairs, in the workers. blur.device cuda renders the blur on `device`
    (which must be a GPU, ValueError otherwise).
    """
    on_gpu = config.blur.device == "cuda" and device is not None
    if on_gpu and device.type != "cuda":
        raise ValueError("blur.device: cuda was asked for, but this run has no GPU: set blur.device to cpu")
    return PairLoader(
        sets,
        config.blur,
        config.data,
        global_batch=config.train.batch,
        seed=config.run.seed,
        start=start,
        batches=batches,
        rank=rank,
        world=world,
        accumulation=config.train.accumulation,
        weights=[source.weight for source in data_sources(config)[0]],
        pin_memory=pin_memory,
        device=device if on_gpu else None,
        attach=attach,
    )
