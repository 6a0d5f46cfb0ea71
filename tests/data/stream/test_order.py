"""The order of samples: a pure function of seed and position; ranks, workers and restarts only divide it."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.stream.config import StreamConfig
from data.stream.crops import CropPlan
from data.stream.order import Plan, Share

SIZES = [5, 7, 3, 9, 12, 12]  # 48 samples


def a_plan(shard_sizes, seed: int, weights=None, **settings) -> Plan:
    return Plan(shard_sizes, seed, StreamConfig(**settings), weights)


def group_samples(plan: Plan, group: int) -> np.ndarray:
    """The samples of the first source that a canonical group owns, for ever."""
    return plan._orders[0][group].samples()


def groups_of(rank: int, world: int, groups: int) -> set[int]:
    """The canonical groups that a rank reads: its part of them, or one that it shares with its neighbours."""
    first = rank * groups // world
    return set(range(first, max((rank + 1) * groups // world, first + 1)))


def positions_of_batch(
    batch: int, global_batch: int, world: int, groups: int = 1, accumulation: int = 1, start: int = 0
):
    return [
        Share(global_batch, rank, world, accumulation, groups).positions(start, batch, micro)
        for rank in range(world)
        for micro in range(accumulation)
    ]


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 2**31), window=st.integers(1, 4), crops=st.integers(1, 3))
def test_every_sample_comes_exactly_once_an_epoch(sizes, seed, window, crops):
    total = sum(sizes)
    plan = a_plan([sizes], seed, window=window, crops_per_decode=crops)
    for epoch in range(3):
        slots = [plan.slot(p) for p in range(epoch * total * crops, (epoch + 1) * total * crops)]
        assert {slot.epoch for slot in slots} == {epoch}
        counts = Counter((slot.sample, slot.crop) for slot in slots)
        assert counts == Counter((sample, crop) for sample in range(total) for crop in range(crops))


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, groups=st.integers(1, 6), seed=st.integers(0, 99))
def test_groups_partition_the_samples_evenly(sizes, groups, seed):
    if sum(sizes) < groups:
        return
    plan = a_plan([sizes], seed, canonical_groups=groups)
    parts = [group_samples(plan, group) for group in range(groups)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(sum(sizes)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for position in range(3 * sum(sizes)):
        assert plan.slot(position).sample in parts[position % groups]


def test_order_differs_between_epochs_and_seeds_and_not_otherwise():
    orders = [
        [a_plan([SIZES], seed).slot(p).sample for p in range(epoch * 48, epoch * 48 + 48)]
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == [a_plan([SIZES], 0).slot(p).sample for p in range(48)]


def test_any_position_can_be_asked_first():
    plan = a_plan([SIZES], 3, window=2, canonical_groups=4)
    forward = [plan.slot(p) for p in range(200)]
    assert [a_plan([SIZES], 3, window=2, canonical_groups=4).slot(p) for p in reversed(range(200))] == forward[::-1]


def test_window_bounds_the_shards_that_are_open_at_once():
    plan = a_plan([[10] * 12], 0, window=3)
    for window in range(4):
        samples = [plan.slot(p).sample for p in range(window * 30, window * 30 + 30)]
        assert len({sample // 10 for sample in samples}) == 3
        assert samples != sorted(samples)
    first_windows = [{plan.slot(p).sample // 10 for p in range(e * 120, e * 120 + 30)} for e in range(6)]
    assert len({frozenset(shards) for shards in first_windows}) > 1  # other shards meet in every epoch


@settings(max_examples=80, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 4, 8, 12]),
    groups=st.sampled_from([1, 2, 4, 12, 24]),
    accumulation=st.sampled_from([1, 2]),
    start=st.integers(0, 500),
    batch=st.integers(0, 5),
)
def test_ranks_and_accumulation_divide_the_same_global_batch(world, groups, accumulation, start, batch):
    if groups % world and world % groups:
        with pytest.raises(DataError, match="must divide the other"):
            Share(24, 0, world, 1, groups)
        return
    parts = positions_of_batch(batch, 24, world, groups, 1, start)
    assert sorted(chain.from_iterable(parts)) == list(range(start + batch * 24, start + batch * 24 + 24))
    for rank, part in enumerate(parts):
        assert {position % groups for position in part} <= groups_of(rank, world, groups)
    if 24 % (world * accumulation) == 0:
        finer = positions_of_batch(batch, 24, world, groups, accumulation, start)
        assert list(chain.from_iterable(finer)) == list(chain.from_iterable(parts))


def test_sixty_four_ranks_of_four_workers_read_only_their_groups_and_every_sample_once():
    world, workers, groups, global_batch = 64, 4, 8, 128
    shard_sizes = [64] * 40  # 2560 samples: 20 global batches
    plan = a_plan([shard_sizes], 7, window=4, canonical_groups=groups)
    seen, per_node = Counter(), {}
    for rank in range(world):
        share = Share(global_batch, rank, world, 1, groups)
        node = rank // 8
        for worker in range(workers):
            for batch in range(worker, 20, workers):
                for position in share.positions(0, batch, 0):
                    slot = plan.slot(position)
                    assert slot.epoch == 0
                    seen[slot.sample] += 1
                    per_node.setdefault(node, set()).add(slot.sample)
    assert seen == Counter(range(2560))
    for node, samples in per_node.items():
        assert samples == set(group_samples(plan, node).tolist())
        assert len({sample // 64 for sample in samples}) <= 6  # 5 shards' worth, one boundary shard more


def test_resuming_on_other_rank_counts_keeps_the_order():
    plan = a_plan([[48] * 10], 5, canonical_groups=1)
    unbroken = [plan.slot(p).sample for p in range(48 * 30)]
    consumed, resumed = 0, []
    for world, steps in ((8, 7), (3, 11), (16, 12)):
        again = a_plan([[48] * 10], 5, canonical_groups=1)
        for batch in range(steps):
            parts = positions_of_batch(batch, 48, world, start=consumed)
            resumed += [again.slot(p).sample for part in parts for p in part]
        consumed += steps * 48
    assert resumed == unbroken


def test_weighted_sources_get_their_shares_and_keep_their_own_epochs():
    plan = a_plan([[5, 7], [30, 10]], 3, weights=[1, 3])
    slots = [plan.slot(p) for p in range(4096)]
    assert Counter(slot.source for slot in slots) == {0: 1024, 1: 3072}
    for source, size in ((0, 12), (1, 40)):
        first = [slot for slot in slots if slot.source == source][: size * 3]
        assert [slot.epoch for slot in first] == sorted(slot.epoch for slot in first)
        assert Counter(slot.sample for slot in first) == Counter(list(range(size)) * 3)
    # well mixed: no long run of one source
    assert all(len({slot.source for slot in slots[i : i + 64]}) == 2 for i in range(0, 4096, 64))


def test_tiny_weight_still_gets_its_turn():
    plan = a_plan([[4], [4]], 0, weights=[1e-9, 1])
    assert Counter(plan.slot(p).source for p in range(1024)) == {0: 1, 1: 1023}


def test_memory_stays_flat_over_many_epochs():
    plan = a_plan([SIZES], 0, window=2)
    for position in range(48 * 50):
        plan.slot(position)
    order = plan._orders[0][0]
    assert len(order._epochs) <= 2
    assert len(order._windows) <= 4


def test_replacement_is_deterministic_in_its_group_and_another_sample():
    plan = a_plan([SIZES], 0, canonical_groups=4)
    slot = plan.slot(6)
    found = plan.replacements(slot, 5)
    assert found == a_plan([SIZES], 0, canonical_groups=4).replacements(slot, 5)
    first = found[:5]
    assert len(set(first)) == 5
    assert slot.sample not in found
    assert set(first) <= set(group_samples(plan, 2).tolist())
    assert len(found) > 5  # a group that lies on one lost shard is not the end


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"global_batch": 10, "world": 4}, "use 12"),
        ({"global_batch": 8, "world": 2, "accumulation": 3}, "use 12"),
        ({"global_batch": 0}, "need 1 or more"),
        ({"global_batch": 8, "rank": 2, "world": 2}, "rank below world"),
        ({"global_batch": 8, "canonical_groups": 3}, "does not divide by canonical_groups 3"),
    ],
)
def test_batches_that_cannot_be_cut_are_refused(arguments, words):
    with pytest.raises(DataError, match=words):
        Share(**arguments)


def test_plans_that_cannot_be_made_are_refused():
    for name in ("window", "canonical_groups", "crops_per_decode"):
        with pytest.raises(ValueError, match=f"{name}\n.*greater than or equal to 1"):
            a_plan([SIZES], 0, **{name: 0})
    with pytest.raises(DataError, match="canonical_groups 49"):
        a_plan([SIZES], 0, canonical_groups=49)
    for weights in ([1], [1, -1], [1, 0], [1, float("nan")]):
        with pytest.raises(DataError, match="weights"):
            a_plan([SIZES, SIZES], 0, weights=weights)


def test_crop_plan_shows_all_boxes_in_k_visits_and_the_same_ones_again():
    plan = CropPlan(32, seed=1, boxes=5, margin=8)
    turns = [[plan.visit("key", 100, 80, turn * 5 + i) for i in range(5)] for turn in range(3)]
    assert all(sorted(crop.number for crop in turn) == list(range(5)) for turn in turns)
    assert {crop.number: crop for crop in turns[0]} == {crop.number: crop for crop in turns[2]}
    assert turns[0] != turns[1] or turns[1] != turns[2]
    assert {crop.flip for turn in turns for crop in turn} == {True, False}


@settings(max_examples=100, deadline=None)
@given(st.integers(16, 90), st.integers(16, 90), st.integers(1, 90), st.integers(0, 60), st.integers(0, 50))
def test_crops_lie_inside_and_keep_the_margin_where_there_is_room(height, width, size, margin, visit):
    plan = CropPlan(size, seed=1, boxes=0, margin=margin)
    if size > min(height, width):
        with pytest.raises(DataError, match="smaller than the crop"):
            plan.visit("key", height, width, visit)
        return
    crop = plan.visit("key", height, width, visit)
    for corner, side in ((crop.top, height), (crop.left, width)):
        edge = min(margin, (side - size) // 2)
        assert edge <= corner <= side - size - edge


def test_boxes_zero_never_repeats_a_plan():
    plan = CropPlan(16, seed=1, boxes=0, margin=0)
    assert len({plan.visit("key", 512, 512, visit).box for visit in range(50)}) == 50
