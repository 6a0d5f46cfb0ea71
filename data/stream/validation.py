"""The fixed validation list: the same pairs on every machine, for any number of ranks."""

import math
from collections.abc import Iterator, Sequence

import torch

from data.blur import TIERS, BlurConfig, sample_rng
from data.errors import DataError
from data.shards.set import ShardSet
from data.stream.crops import CropPlan, check_crop_fits, margin_of
from data.stream.pairs import PAIRED, Sources, make_pair


def validation_pairs(
    shards: ShardSet,
    blur: BlurConfig,
    *,
    crop: int,
    margin: int,
    seed: int,
    tiers: Sequence[str] = TIERS,
    crops: int = 1,
    rank: int = 0,
    world: int = 1,
    samples: Sequence[int] | None = None,
) -> Iterator[dict]:
    """The fixed validation list: every sample × crop × tier in index order; rank r takes r::world.

    crop and margin: side of the crops and their distance from the photographs' edges, px; crops: a photograph and tier;
    samples: those of the set that are used, by their places in it, None for all; a sample's pairs are the same in any
    choice.

    Yields dicts: blurry, sharp uint8 [3, S, S] tensors, kernel float32 [k, k] or None, key, tier, extent (px),
    input_psnr (dB), generator, box, flip, number (place in the list). A set of recorded pairs has one tier, "paired".
    Equal arguments give equal pairs on any machine and for any `world`. Raises DataError.
    """
    check_crop_fits(shards, crop, "eval.crop")
    plan = CropPlan(crop, seed, crops, margin_of(shards, blur, margin))
    sources = Sources([shards])
    tiers = (PAIRED,) if shards.kind == "pairs" else tuple(tiers)
    held: tuple[int, tuple] | None = None
    chosen = range(len(shards)) if samples is None else samples
    for number in range(rank, len(chosen) * crops * len(tiers), world):
        place, rest = divmod(number, crops * len(tiers))
        sample = chosen[place]
        which, tier = divmod(rest, len(tiers))
        if held is None or held[0] != sample:
            held = sample, sources.photograph(0, sample)
        sharp, blurry = held[1]
        key = shards.key(sample)
        box = plan.at(key, *sharp.shape[:2], which)
        # One stream a tier: leaving a tier out of the list changes no pair of the others.
        rng = sample_rng(seed, 0, f"validation:{key}:{tiers[tier]}", which)
        try:
            extent = math.nan if blurry is None else sources.recorded_extent(0, sample)
            pair = make_pair(sharp, blurry, box, rng, blur, tier=tiers[tier], extent=extent)
        except ValueError as error:
            raise DataError(f"{shards.name(sample)}: {error}") from None
        yield {
            "blurry": torch.from_numpy(pair.blurry.transpose(2, 0, 1).copy()),
            "sharp": torch.from_numpy(pair.sharp.transpose(2, 0, 1).copy()),
            "kernel": pair.kernel,
            "key": key,
            "box": box.box,
            "flip": box.flip,
            "number": number,
            **{name: pair.meta[name] for name in ("tier", "extent", "input_psnr", "generator")},
        }


def validation_count(shards: ShardSet, tiers: Sequence[str] = TIERS, crops: int = 1) -> int:
    """How many pairs `validation_pairs` gives over all ranks."""
    return len(shards) * crops * (1 if shards.kind == "pairs" else len(tiers))
