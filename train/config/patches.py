"""Progressive patches: crops grow and batches shrink over a run, at steps that the configuration names.

Positions in the training stream are counted in pairs, so a phase is a whole number of global batches of its own size
and starts at the pair where the one before it ended: no pair is made and thrown away, and a run resumes exactly on
either side of a change. The idea is Restormer's (Zamir et al., CVPR 2022, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from data.shards.set import ShardSet
from data.stream.crops import check_crop_fits
from train.config.schema import Config


@dataclass(frozen=True)
class Phase:
    """Steps first … last − 1, of `batch` pairs with crops of `crop` px; `start` pairs of the stream lie before them."""

    first: int
    last: int
    start: int
    crop: int
    batch: int


def phases(config: Config) -> list[Phase]:
    """The phases of a run in their order: one, unless train.progressive names more."""
    train = config.train
    sizes = [(0, config.data.crop, train.batch)]
    sizes += [(each.at, each.crop, each.batch or train.batch) for each in train.progressive if each.at < train.steps]
    found, start = [], 0
    for (first, crop, batch), (last, *_) in pairwise([*sizes, (train.steps, 0, 0)]):
        found.append(Phase(first, last, start, crop, batch))
        start += (last - first) * batch
    return found


def phase_at(config: Config, step: int) -> Phase:
    """The phase of the 0-based `step`; the last one from the end on."""
    return next((each for each in phases(config) if step < each.last), phases(config)[-1])


def pairs_before(config: Config, step: int) -> int:
    """Pairs that the first `step` steps of a run consume: where its stream goes on."""
    phase = phase_at(config, step)
    return phase.start + (step - phase.first) * phase.batch


def in_phase(config: Config, phase: Phase) -> Config:
    """The configuration with the crop and the batch of a phase."""
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"crop": phase.crop}),
            "train": config.train.model_copy(update={"batch": phase.batch}),
        }
    )


def dearest(config: Config) -> Phase:
    """The phase whose steps hold the most pixels, the first of them: what memory must suffice for."""
    return max(phases(config), key=lambda each: each.batch * each.crop**2)


def largest_crop(config: Config) -> int:
    """Side of the largest crop that a run trains on, px."""
    return max(each.crop for each in phases(config))


def evaluated_at_once(config: Config, world: int, device: str) -> int:
    """Pairs in a forward pass of an evaluation: on a GPU up to eight, but no more pixels than four micro-batches of
    training have, which keep gradients and all that these need; one on a CPU, which nothing is gained on."""
    if device == "cpu":
        return 1
    trained = min(in_phase(config, each).micro_batch(world) * each.crop**2 for each in phases(config))
    return max(1, min(8, 4 * trained // config.eval.crop**2))


def check_crops_fit(config: Config, sets: Sequence[ShardSet]) -> None:
    """DataError where a sample is smaller than a crop of any phase: at the start, not at the step that needs it."""
    for shards in sets:
        check_crop_fits(shards, largest_crop(config), "train.progressive" if config.train.progressive else "data.crop")
