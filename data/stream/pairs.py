"""The training stream: planned positions → photographs → crops → blurry and sharp pairs → batches.

A `webdataset.DataPipeline` whose source is our plan instead of a shuffled list of shards: which pair stands at a
position depends on (seed, position) only, so ranks, workers, accumulation and resuming change who makes a pair, never
the pair itself.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from data.blur import BlurConfig, draw_attempt, plan_pair, sample_rng, synthesize_pair
from data.blur.batched import pairs_of_plans
from data.errors import DataError
from data.image import decode_image, psnr
from data.shards.set import ShardSet
from data.stream.crops import Crop, CropPlan
from data.stream.hung import at_sample
from data.stream.order import Plan, Share, Slot

_MEASURED = ("tier", "extent", "generator", "input_psnr")
PAIRED = "paired"  # tier and generator of pairs that were recorded, not synthesized


@dataclass
class Sources:
    """Shard sets, and how bad samples in them are treated.

    A sample that cannot be read is an error while `max_bad_fraction` is 0; above that it is replaced by another sample
    of its canonical group, the same one everywhere, and reported to the main process.
    """

    sets: Sequence[ShardSet]
    max_bad_fraction: float = 0.0
    broken: dict[tuple[int, int], str] = field(default_factory=dict)

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
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, dict]:
    """(blurry, sharp, kernel, metadata) of one crop, synthesized or cut from a recorded pair; uint8 [S, S, 3]."""
    if blurry is None:
        pair = synthesize_pair(sharp, crop.box, rng, blur, tier=tier, flip=crop.flip)
        return pair.blurry, pair.sharp, pair.kernel, pair.meta
    window = np.s_[crop.top : crop.top + crop.size, crop.left : crop.left + crop.size]
    cut = [np.ascontiguousarray(image[window][:, ::-1] if crop.flip else image[window]) for image in (blurry, sharp)]
    meta = {"tier": PAIRED, "generator": PAIRED, "extent": math.nan, "input_psnr": psnr(*cut)}
    return cut[0], cut[1], None, meta


@dataclass
class PlannedBatches:
    """Source stage: lists of slots, one list a micro-batch; a loader worker takes every num_workers-th list."""

    plan: Plan
    share: Share
    start: int
    batches: int | None

    def __call__(self) -> Iterator[list[Slot]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        numbers = itertools.count(first, step)
        if self.batches is not None:
            numbers = range(first, self.batches * self.share.accumulation, step)
        for number in numbers:
            batch, micro = divmod(number, self.share.accumulation)
            yield [self.plan.slot(position) for position in self.share.positions(self.start, batch, micro)]


@dataclass
class MakePairs:
    """Stage: a list of slots becomes a list of pairs (dicts); photographs that neighbours share are decoded once.

    `defer` leaves the pixels of synthesized pairs to `render_deferred` in the main process: a pair is a plan then.
    """

    sources: Sources
    plan: Plan
    crops: CropPlan
    blur: BlurConfig
    seed: int
    defer: bool = False
    replacements: int = 64

    def __call__(self, lists: Iterable[list[Slot]]) -> Iterator[list[dict]]:
        for slots in lists:
            self._read_ahead(slots)
            bad: list[tuple[int, int, str]] = []
            held: tuple[tuple[int, int], tuple] | None = None
            pairs = []
            for slot in slots:
                if held is None or held[0] != (slot.source, slot.sample):
                    held = (slot.source, slot.sample), self._sound_photograph(slot, bad)
                pairs.append(self._pair(slot, *held[1]))
            pairs[0]["bad"] = bad
            yield pairs

    def _read_ahead(self, slots: list[Slot]) -> None:
        """Have the remote shards of this window and the next fetched while pairs are made."""
        if any(shards.remote for shards in self.sources.sets):
            wanted = dict.fromkeys(ask for slot in slots for ask in self.plan.ahead(slot.position))
            for source, sample in wanted:
                shards = self.sources.sets[source]
                if shards.remote:
                    shards.cache.ahead(shards.location, [shards.shards[shards.locate(sample)[0]]])

    def _sound_photograph(self, slot: Slot, bad: list) -> tuple[int, np.ndarray, np.ndarray | None]:
        """(sample, sharp, blurry) at the slot, or of the first sound replacement."""
        candidates: Iterable[int] = [slot.sample]
        if self.sources.max_bad_fraction > 0:
            # Lazy: the permutation of a large group is drawn only once something is bad.
            rest = (self.plan.replacements(slot, self.replacements) for _ in range(1))
            candidates = itertools.chain(candidates, itertools.chain.from_iterable(rest))
        for sample in candidates:
            try:
                return sample, *self.sources.photograph(slot.source, sample)
            except DataError as error:
                if self.sources.max_bad_fraction == 0:
                    raise
                self.sources.broken[slot.source, sample] = str(error)  # not read from disk again
                bad.append((slot.source, sample, str(error)))
        raise DataError(f"{bad[-1][2]} (and {len(bad) - 1} replacements for it were bad too; run `sharpprior verify`)")

    def _pair(self, slot: Slot, sample: int, sharp: np.ndarray, blurry: np.ndarray | None) -> dict:
        shards = self.sources.sets[slot.source]
        shard, row = shards.locate(sample)
        key = shards.shards[shard].keys[row]
        visit = slot.epoch * self.plan.crops_per_decode + slot.crop
        crop = self.crops.visit(key, *sharp.shape[:2], visit)
        rng = sample_rng(self.seed, slot.epoch, key, slot.crop)
        facts = {"key": key, "image": shards.image_id(sample), "crop": crop, "slot": slot}
        try:
            if self.defer and blurry is None:
                plan = plan_pair(sharp, crop.box, rng.bytes(16).hex(), self.blur, flip=crop.flip)
                return facts | {"plan": plan, "attempt": draw_attempt(plan, 0)}
            blurry, sharp, _, meta = make_pair(sharp, blurry, crop, rng, self.blur)
        except ValueError as error:
            raise DataError(f"{shards.name(sample)}: {error}") from None
        return facts | {"blurry": blurry, "sharp": sharp} | {name: meta[name] for name in _MEASURED}


def collate(pairs: list[dict]) -> dict:
    """One batch of pairs: images as uint8 [B, 3, S, S] tensors, numbers as arrays [B], names as lists.

    Pairs that wait for their pixels stay a list, "deferred".
    """
    crops, slots = [pair["crop"] for pair in pairs], [pair["slot"] for pair in pairs]
    batch = {
        **{name: [pair[name] for pair in pairs] for name in ("key", "image")},
        "box": np.array([crop.box for crop in crops], np.int64),
        "crop": np.array([crop.number for crop in crops], np.int64),
        "flip": np.array([crop.flip for crop in crops], bool),
        "epoch": np.array([slot.epoch for slot in slots], np.int64),
        "source": np.array([slot.source for slot in slots], np.int64),
        "position": np.array([slot.position for slot in slots], np.int64),
        "bad": pairs[0]["bad"],
    }
    if any("plan" in pair for pair in pairs):
        kept = ("plan", "attempt", "blurry", "sharp", *_MEASURED)
        return batch | {"deferred": [{name: pair[name] for name in kept if name in pair} for pair in pairs]}
    images = {
        name: torch.from_numpy(np.stack([pair[name].transpose(2, 0, 1) for pair in pairs]))
        for name in ("blurry", "sharp")
    }
    return batch | images | _measured(pairs)


def _measured(pairs: list[dict]) -> dict:
    return {name: [pair[name] for pair in pairs] for name in ("tier", "generator")} | {
        name: np.array([pair[name] for pair in pairs], np.float32) for name in ("extent", "input_psnr")
    }


def render_deferred(batch: dict, device: torch.device | str) -> dict:
    """The batch with its images, uint8 [B, 3, S, S] on `device`: plans rendered, recorded pairs copied."""
    pairs = batch.pop("deferred")
    waiting = [pair for pair in pairs if "plan" in pair]
    made = pairs_of_plans([pair["plan"] for pair in waiting], device, [pair["attempt"] for pair in waiting])
    for pair, rendered in zip(waiting, made, strict=True):
        pair |= {"blurry": rendered.blurry, "sharp": rendered.sharp} | {name: rendered.meta[name] for name in _MEASURED}
    images = {
        name: torch.stack([torch.as_tensor(pair[name]).to(device) for pair in pairs]).permute(0, 3, 1, 2).contiguous()
        for name in ("blurry", "sharp")
    }
    return batch | images | _measured(pairs)


@dataclass
class Collate:
    """Last stages: batches, and `attach(batch)` on each (the feature cache's look-up) where one is given."""

    attach: Callable[[dict], None] | None = None

    def __call__(self, lists: Iterable[list[dict]]) -> Iterator[dict]:
        for pairs in lists:
            batch = collate(pairs)
            if self.attach is not None:
                self.attach(batch)
            yield batch


def failures_as_batches(batches: Iterable[dict]) -> Iterator[dict]:
    """A DataError becomes a last {"failure": message}: torch would add the worker's traceback to it."""
    try:
        yield from batches
    except DataError as error:
        yield {"failure": str(error)}


def pair_pipeline(
    sources: Sources,
    blur: BlurConfig,
    plan: Plan,
    crops: CropPlan,
    share: Share,
    *,
    start: int = 0,
    batches: int | None = None,
    defer: bool = False,
    attach: Callable[[dict], None] | None = None,
) -> wds.DataPipeline:
    """The stream of one rank as a webdataset pipeline of micro-batches; `PairLoader` runs it in workers."""
    return wds.DataPipeline(
        PlannedBatches(plan, share, start, batches),
        MakePairs(sources, plan, crops, blur, plan.seed, defer),
        Collate(attach),
        failures_as_batches,
    )
