"""The order of training samples: a pure function of (seed, epoch), so that one integer resumes a run exactly.

Samples are numbered by their position p = 0, 1, 2, … in an endless sequence; `samples_consumed` is the next p. The next
global batch is positions p … p + GB − 1, whatever the number of ranks, workers and accumulation steps: those only say
who makes which part. Position p belongs to canonical group p mod G. A group owns a fixed part of each source, so a node
that serves a few groups reads only their shards. Inside a group and an epoch: shards permuted, taken W at a time (a
window), samples permuted inside it. All of this is computed where it is asked for; a few windows are held at most.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import DataError
from data.stream.config import StreamConfig

_BLOCK = 1024  # positions over which the sources' shares are exact


def derived_rng(*parts: int | str) -> np.random.Generator:
    """Philox generator keyed by blake2b of the parts: equal parts give equal numbers on every machine."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    key = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


@dataclass(frozen=True)
class Slot:
    """What stands at a position: sample `sample` of source `source`, its `crop`-th crop in its `epoch`."""

    position: int
    source: int
    sample: int
    epoch: int
    crop: int


class _GroupOrder:
    """The order of one group's part of one source; `at(i)` is its i-th sample, epochs following each other."""

    def __init__(self, segments: Sequence[tuple[int, int]], window: int, name: tuple[int | str, ...]) -> None:
        # [n, 2]: first sample, count; each inside one shard
        self.segments = np.array(segments, np.int64).reshape(-1, 2)
        self.window, self.name = window, name
        self.length = int(self.segments[:, 1].sum())
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Permuted segments of an epoch and the position where each of its windows starts."""
        if epoch not in self._epochs:
            segments = derived_rng("shards", *self.name, epoch).permutation(self.segments)
            starts = np.add.reduceat(segments[:, 1], np.arange(0, len(segments), self.window)).cumsum()
            self._epochs[epoch] = segments, np.concatenate([[0], starts])
            _forget_oldest(self._epochs, 2)
        return self._epochs[epoch]

    def _window(self, epoch: int, number: int) -> np.ndarray:
        if (epoch, number) not in self._windows:
            chosen = self._epoch(epoch)[0][number * self.window : (number + 1) * self.window]
            samples = np.concatenate([np.arange(first, first + count) for first, count in chosen])
            derived_rng("samples", *self.name, epoch, number).shuffle(samples)
            self._windows[epoch, number] = samples
            _forget_oldest(self._windows, 4)
        return self._windows[epoch, number]

    def at(self, index: int) -> tuple[int, int]:
        """(epoch, sample) of draw `index`."""
        epoch, place = divmod(index, self.length)
        starts = self._epoch(epoch)[1]
        number = int(np.searchsorted(starts, place, side="right")) - 1
        return epoch, int(self._window(epoch, number)[place - starts[number]])

    def ahead(self, index: int) -> np.ndarray:
        """First samples of the shard segments of the window at draw `index` and of the window after it."""
        epoch, place = divmod(index, self.length)
        segments, starts = self._epoch(epoch)
        number = int(np.searchsorted(starts, place, side="right")) - 1
        soon = segments[number * self.window : (number + 2) * self.window, 0]
        if number + 2 >= len(starts):  # the last window of its epoch: the next epoch's first follows
            soon = np.concatenate([soon, self._epoch(epoch + 1)[0][: self.window, 0]])
        return soon

    def samples(self) -> np.ndarray:
        """Every sample of the group's part, ascending by segment."""
        return np.concatenate([np.arange(first, first + count) for first, count in self.segments])


def _forget_oldest(cache: OrderedDict, keep: int) -> None:
    while len(cache) > keep:
        cache.popitem(last=False)


def _split_into_groups(
    shard_sizes: Sequence[int], groups: int, name: tuple[int | str, ...]
) -> list[list[tuple[int, int]]]:
    """Give each group an equal run of samples (±1) along the shards in a seeded order; a shard may serve two groups."""
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    order = derived_rng("groups", *name).permutation(len(shard_sizes))
    bounds = [int(starts[-1]) * g // groups for g in range(groups + 1)]
    parts: list[list[tuple[int, int]]] = [[] for _ in range(groups)]
    done, group = 0, 0
    for shard in order:
        first, left = int(starts[shard]), int(shard_sizes[shard])
        while left:
            while done >= bounds[group + 1]:
                group += 1
            take = min(left, bounds[group + 1] - done)
            parts[group].append((first, take))
            first, left, done = first + take, left - take, done + take
    return parts


class Plan:
    """Which sample stands at which position, for one or several sources.

    `shard_sizes[s]` lists the samples in each shard of source s. `weights` are the sources' shares of all positions
    (exact over blocks of 1024 per group), None: equal; an epoch is one pass over a group's part of one source.
    `stream.crops_per_decode` puts c positions in a row of a group on one photograph, so that one decode serves them.
    Raises DataError.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int]],
        seed: int,
        stream: StreamConfig,
        weights: Sequence[float] | None = None,
    ) -> None:
        groups = stream.canonical_groups
        weights = [1.0] * len(shard_sizes) if weights is None else list(weights)
        if len(weights) != len(shard_sizes) or any(not w > 0 or not np.isfinite(w) for w in weights):
            raise DataError(f"weights {weights}: give one positive number for each of the {len(shard_sizes)} sources")
        if len(weights) > _BLOCK:
            raise DataError(f"{len(weights)} sources: {_BLOCK} at most can have their shares; join some of them")
        for source, sizes in enumerate(shard_sizes):
            if sum(sizes) < groups:
                raise DataError(
                    f"source {source}: {sum(sizes)} samples cannot fill canonical_groups {groups}; lower it"
                )
        self.seed, self.canonical_groups, self.crops_per_decode = seed, groups, stream.crops_per_decode
        self.sizes = [int(sum(sizes)) for sizes in shard_sizes]
        self._orders = [
            [
                _GroupOrder(part, stream.window, (seed, source, group))
                for group, part in enumerate(_split_into_groups(sizes, groups, (seed, source)))
            ]
            for source, sizes in enumerate(shard_sizes)
        ]
        self._quota = _quotas(weights)
        self._blocks: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def _source(self, group: int, draw: int) -> tuple[int, int]:
        """(source, which draw of that source) for the group's `draw`-th photograph."""
        if len(self.sizes) == 1:
            return 0, draw
        block, place = divmod(draw, _BLOCK)
        if (group, block) not in self._blocks:
            sources = np.repeat(np.arange(len(self._quota)), self._quota)
            derived_rng("mix", self.seed, group, block).shuffle(sources)
            before = np.zeros(_BLOCK, np.int64)
            for source in range(len(self._quota)):
                chosen = sources == source
                before[chosen] = np.arange(chosen.sum())
            self._blocks[group, block] = sources, before
            _forget_oldest(self._blocks, 4 * self.canonical_groups)
        sources, before = self._blocks[group, block]
        source = int(sources[place])
        return source, block * int(self._quota[source]) + int(before[place])

    def slot(self, position: int) -> Slot:
        """What stands at `position`."""
        draw, group = divmod(position, self.canonical_groups)
        draw, crop = divmod(draw, self.crops_per_decode)
        source, index = self._source(group, draw)
        epoch, sample = self._orders[source][group].at(index)
        return Slot(position, source, sample, epoch, crop)

    def ahead(self, position: int) -> list[tuple[int, int]]:
        """(source, sample) of one sample in each shard that this position's group reads now or next."""
        draw, group = divmod(position, self.canonical_groups)
        source, index = self._source(group, draw // self.crops_per_decode)
        return [(source, int(sample)) for sample in self._orders[source][group].ahead(index)]

    def replacements(self, slot: Slot, attempts: int) -> list[int]:
        """Samples to try in turn when the one at `slot` is bad, drawn by (seed, epoch, sample): of its group, then of
        all (a whole group may lie on one lost shard)."""
        group = slot.position % self.canonical_groups
        rng = derived_rng("replace", self.seed, slot.source, slot.epoch, slot.sample)
        own = rng.permutation(self._orders[slot.source][group].samples())
        own = [int(sample) for sample in own[: attempts + 1] if sample != slot.sample][:attempts]
        others = rng.integers(self.sizes[slot.source], size=attempts if self.canonical_groups > 1 else 0)
        return own + [int(sample) for sample in others if sample != slot.sample]


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """Whole numbers summing to the block, nearest to the weights (largest remainders), each at least 1."""
    share = np.array(weights, np.float64) / sum(weights) * _BLOCK
    quota = np.maximum(np.floor(share).astype(np.int64), 1)
    order = np.argsort(-(share - np.floor(share)), kind="stable")
    for turn in range(int(_BLOCK - quota.sum())):
        quota[order[turn % len(order)]] += 1
    while quota.sum() > _BLOCK:
        quota[np.argmax(quota)] -= 1
    return quota


@dataclass(frozen=True)
class Share:
    """A rank's part of every global batch, cut into `accumulation` micro-batches.

    With G canonical groups and R ranks one must divide the other: rank r serves groups r·G/R … (r+1)·G/R − 1, or shares
    its group with R/G − 1 neighbours. Raises DataError, with the numbers, where the batch cannot be cut.
    """

    global_batch: int
    rank: int = 0
    world: int = 1
    accumulation: int = 1
    canonical_groups: int = 1

    def __post_init__(self) -> None:
        batch, world, groups = self.global_batch, self.world, self.canonical_groups
        if min(batch, world, self.accumulation, groups) < 1 or not 0 <= self.rank < world:
            raise DataError(f"global batch {batch}, rank {self.rank} of {world}: need 1 or more, and rank below world")
        if batch % (world * self.accumulation):
            raise DataError(
                f"global batch {batch} does not divide by {world} ranks × {self.accumulation} accumulation steps; "
                f"use {-(-batch // (world * self.accumulation)) * world * self.accumulation}"
            )
        if batch % groups:
            raise DataError(f"global batch {batch} does not divide by canonical_groups {groups}; change one of them")
        if groups % world and world % groups:
            raise DataError(
                f"canonical_groups {groups} and {world} ranks: one must divide the other; "
                "canonical_groups: 1 works with any number of ranks"
            )

    @property
    def micro_batch(self) -> int:
        """Samples in one micro-batch of one rank."""
        return self.global_batch // (self.world * self.accumulation)

    def positions(self, start: int, batch: int, micro: int) -> list[int]:
        """Positions of micro-batch `micro` of global batch `batch` counted from position `start`."""
        first = start + batch * self.global_batch
        # Offsets of the batch ordered by group, so that consecutive ranks cut consecutive groups.
        groups = self.canonical_groups
        per_group = self.global_batch // groups
        low = self.rank * self.global_batch // self.world + micro * self.micro_batch
        mine = range(low, low + self.micro_batch)
        return [first + (j // per_group - first) % groups + (j % per_group) * groups for j in mine]
