"""The training stream: planned positions → photographs → crops → blurry and sharp pairs → batches.

Two stages of a `webdataset.DataPipeline` whose source is our plan instead of a shuffled list of shards: which pair
stands at a position depends on (seed, position) only, so ranks, workers, accumulation and resuming change who makes a
pair, never the pair itself.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import get_worker_info

from data.blur import BlurConfig, BlurPair, draw_attempt, plan_pair, sample_rng, synthesize_pair
from data.errors import DataError
from data.image import decode_image, psnr
from data.shards.set import ShardSet
from data.stream.batch import Made, Planned, Waiting, collate
from data.stream.crops import Crop, CropPlan
from data.stream.hung import at_sample
from data.stream.order import Plan, Share, Slot

PAIRED = "paired"  # tier and generator of pairs that were recorded, not synthesized
REPLACEMENTS = 64  # samples tried in place of a bad one


@dataclass
class Sources:
    """Shard sets, and how bad samples in them are treated.

    A sample that cannot be read is an error while `max_bad_fraction` is 0; above that it is replaced by another sample
    of its canonical group, the same one everywhere, and reported to the main process.
    """

    sets: Sequence[ShardSet]
    max_bad_fraction: float = 0.0
    broken: dict[tuple[int, int], str] = field(default_factory=dict)

    def recorded_extent(self, source: int, sample: int) -> float:
        """Extent of a recorded pair's blur, px, where the set's maker knew it (windows of frames); else NaN."""
        shards = self.sets[source]
        if "json" not in shards.extensions(sample):
            return math.nan
        try:
            facts = json.loads(shards.read(sample, "json"))
            return float(facts["extent_px"]) if isinstance(facts, dict) and "extent_px" in facts else math.nan
        except (DataError, OSError, ValueError, TypeError):  # others' files hold what they like
            return math.nan

    def photograph(self, source: int, sample: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(sharp RGB, blurry RGB of a recorded pair or None), uint8 [H, W, 3]; DataError names shard and sample."""
        shards = self.sets[source]
        name = shards.name(sample)
        at_sample(name)
        if (source, sample) in self.broken:
            raise DataError(self.broken[source, sample])
        try:
            roles = ("sharp", "blurry") if shards.kind == "pairs" else (None,)
            images = [decode_image(shards.read(sample, shards.image_member(sample, role)), name) for role in roles]
        except OSError as error:
            raise DataError(f"{name}: {error.strerror or error}; check the storage") from None
        if any(image.shape[:2] != shards.size(sample) for image in images):
            raise DataError(
                f"{name}: the image's size is not the index's; make the index again with `sharpprior index`"
            )
        return images[0], images[1] if len(images) > 1 else None


def make_pair(
    sharp: np.ndarray,
    blurry: np.ndarray | None,
    crop: Crop,
    rng: np.random.Generator,
    blur: BlurConfig,
    tier: str | None = None,
    extent: float = math.nan,
) -> BlurPair:
    """The pair of one crop, synthesized from `sharp` or cut from the recorded `blurry` too; uint8 [H, W, 3].

    extent: of a recorded pair, px, where it is known.
    """
    if blurry is None:
        return synthesize_pair(sharp, crop.box, rng, blur, tier=tier, flip=crop.flip)
    window = np.s_[crop.top : crop.top + crop.size, crop.left : crop.left + crop.size]
    cut = [np.ascontiguousarray(image[window][:, ::-1] if crop.flip else image[window]) for image in (blurry, sharp)]
    meta = {"tier": PAIRED, "generator": PAIRED, "extent": extent, "seed": "", "input_psnr": psnr(*cut)}
    return BlurPair(*cut, None, meta)


def planned_slots(plan: Plan, share: Share, start: int, batches: int | None) -> Iterator[list[Slot]]:
    """Source stage: lists of slots, one list a micro-batch; a loader worker takes every num_workers-th list."""
    worker = get_worker_info()
    first, step = (worker.id, worker.num_workers) if worker else (0, 1)
    numbers = itertools.count(first, step)
    if batches is not None:
        numbers = range(first, batches * share.accumulation, step)
    for number in numbers:
        batch, micro = divmod(number, share.accumulation)
        yield [plan.slot(position) for position in share.positions(start, batch, micro)]


@dataclass
class MakeBatches:
    """Stage: a list of slots becomes a micro-batch; photographs that neighbours share are decoded once.

    crops: the plan of each source. defer: leave the pixels of synthesized pairs to `finish` in the main process.
    attach: adds to each batch what it knows of its crops (the feature cache's look-up). A DataError ends the stage with
    a last `Made` that says so: torch would add the worker's traceback to it.
    """

    sources: Sources
    plan: Plan
    crops: Sequence[CropPlan]
    blur: BlurConfig
    defer: bool = False
    attach: Callable[[dict], None] | None = None

    def __call__(self, lists: Iterable[list[Slot]]) -> Iterator[Made]:
        try:
            for slots in lists:
                yield self._made(slots)
        except DataError as error:
            yield Made({}, failure=str(error))

    def _made(self, slots: list[Slot]) -> Made:
        self._read_ahead(slots)
        bad: list[tuple[int, int, str]] = []
        held: tuple[tuple[int, int], tuple] | None = None
        pairs = []
        for slot in slots:
            if held is None or held[0] != (slot.source, slot.sample):
                held = (slot.source, slot.sample), self._sound_photograph(slot, bad)
            pairs.append(self._pair(slot, *held[1]))
        made = collate(pairs, bad)
        if self.attach is not None:
            self.attach(made.batch)
        return made

    def _read_ahead(self, slots: list[Slot]) -> None:
        """Have the remote shards of this window and the next fetched while pairs are made."""
        if any(shards.remote for shards in self.sources.sets):
            wanted = dict.fromkeys(ask for slot in slots for ask in self.plan.ahead(slot.position))
            for source, sample in wanted:
                shards = self.sources.sets[source]
                if shards.remote:
                    shards.cache.ahead(shards.location, [shards.shards[shards.locate(sample)[0]]])

    def _candidates(self, slot: Slot) -> Iterator[int]:
        """The slot's sample and, where samples may be bad, its replacements, drawn only once one is asked for."""
        yield slot.sample
        if self.sources.max_bad_fraction > 0:
            yield from self.plan.replacements(slot, REPLACEMENTS)

    def _sound_photograph(self, slot: Slot, bad: list) -> tuple[int, np.ndarray, np.ndarray | None]:
        """(sample, sharp, blurry) at the slot, or of the first sound replacement."""
        for sample in self._candidates(slot):
            try:
                return sample, *self.sources.photograph(slot.source, sample)
            except DataError as error:
                if self.sources.max_bad_fraction == 0:
                    raise
                self.sources.broken[slot.source, sample] = str(error)  # not read from disk again
                bad.append((slot.source, sample, str(error)))
        raise DataError(f"{bad[-1][2]} (and {len(bad) - 1} replacements for it were bad too; run `sharpprior verify`)")

    def _pair(self, slot: Slot, sample: int, sharp: np.ndarray, blurry: np.ndarray | None) -> Planned:
        shards = self.sources.sets[slot.source]
        key = shards.key(sample)
        crop = self.crops[slot.source].visit(key, *sharp.shape[:2], slot.epoch * self.plan.crops_per_decode + slot.crop)
        # Sets may share keys; a pair's blur is its own all the same.
        name = key if slot.source == 0 else f"source {slot.source}: {key}"
        rng = sample_rng(self.plan.seed, slot.epoch, name, slot.crop)
        try:
            if self.defer and blurry is None:
                plan = plan_pair(sharp, crop.box, rng.bytes(16).hex(), self.blur, flip=crop.flip)
                pixels = Waiting(plan, draw_attempt(plan, 0))
            else:
                extent = math.nan if blurry is None else self.sources.recorded_extent(slot.source, sample)
                pixels = make_pair(sharp, blurry, crop, rng, self.blur, extent=extent)
        except ValueError as error:
            raise DataError(f"{shards.name(sample)}: {error}") from None
        return Planned(key, shards.image_id(sample), crop, slot, pixels)
