"""The training pairs that yardsticks are chosen on: a function of the sets and the configuration alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

from data.errors import DataError
from data.shards.set import ShardSet
from data.stream.crops import PAIRS_VERSION
from data.stream.validation import validation_pairs
from train.config.patches import largest_crop
from train.config.schema import Config
from train.config.sources import digest_of
from train.evaluate.yardsticks import AMOUNTS, SIGMAS, Moments, moments
from train.log import log

PHOTOGRAPHS = 16  # over all sets, each with a pair of every tier: a second or two on a CPU
SEED = 1  # not that of the validation list: a set may be used for both


def training_pairs(
    config: Config, sets: Sequence[ShardSet], *, photographs: int = PHOTOGRAPHS, rank: int = 0, world: int = 1
) -> Iterator[dict]:
    """Pairs as `validation_pairs` yields them, a pair a tier of photographs spread over the training sets; rank r takes
    the photographs r::world. DataError for a bad sample, which is left out and told where data.max_bad_fraction allows
    some."""
    share = -(-photographs // len(sets))
    counts = [(shards, min(share, len(shards))) for shards in sets]
    places = [(shards, n * len(shards) // count) for shards, count in counts for n in range(count)]
    for shards, sample in places[rank::world]:
        how = {"crop": largest_crop(config), "margin": config.data.margin, "seed": SEED, "samples": [sample]}
        try:
            yield from validation_pairs(shards, config.blur, **how)
        except DataError as error:
            if config.data.max_bad_fraction == 0:
                raise
            log.warning("yardsticks: %s: left out", error)


def training_moments(config: Config, sets: Sequence[ShardSet], *, rank: int = 0, world: int = 1) -> list[Moments]:
    """What `choose` needs of this rank's share of the training pairs."""
    pairs = training_pairs(config, sets, rank=rank, world=world)
    return [moments(pair["blurry"], pair["sharp"], pair["tier"]) for pair in pairs]


def training_digest(config: Config, sets: Sequence[ShardSet]) -> str:
    """Of all that decides the pairs of `training_pairs`, and what is chosen on them."""
    facts = [
        digest_of(sets),
        config.blur.model_dump(mode="json"),
        [largest_crop(config), config.data.margin, config.data.max_bad_fraction],
        [PHOTOGRAPHS, SEED, PAIRS_VERSION, SIGMAS, AMOUNTS],
    ]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
