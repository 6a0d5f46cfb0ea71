"""The validation list: fixed, divided over ranks, one tier of recorded pairs."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data.blur import TIERS
from data.shards.set import ShardSet
from data.stream.validation import validation_count, validation_pairs
from tests.data.stream.test_loader import BLUR, SAMPLES
from tests.data.streams import loader

pytestmark = pytest.mark.slow


def validated(root: Path, **options) -> Iterator[dict]:
    return validation_pairs(ShardSet(root), BLUR, **{"crop": 32, "margin": 8, "seed": 0} | options)


def test_validation_list_is_fixed_and_divides_over_ranks(make_set):
    root = make_set([3])
    whole = list(validated(root))
    assert len(whole) == validation_count(ShardSet(root)) == 3 * len(TIERS)
    assert [pair["tier"] for pair in whole[: len(TIERS)]] == list(TIERS)
    assert [pair["number"] for pair in whole] == list(range(15))
    parts = [list(validated(root, rank=rank, world=4)) for rank in range(4)]
    for number, pair in enumerate(whole):
        other = parts[number % 4][number // 4]
        assert other["key"] == pair["key"]
        assert torch.equal(other["blurry"], pair["blurry"])
        assert torch.equal(other["sharp"], pair["sharp"])


def test_validation_of_some_tiers_leaves_their_pairs_as_they_are(make_set):
    root = make_set([2])
    whole = {(p["key"], p["tier"]): p["blurry"] for p in validated(root)}
    for pair in validated(root, tiers=["severe"]):
        assert torch.equal(pair["blurry"], whole[pair["key"], "severe"])


def test_validation_of_recorded_pairs_has_one_tier(make_set):
    pairs = list(validated(make_set([3], kind="pairs")))
    assert [pair["tier"] for pair in pairs] == ["paired"] * 3
    assert all(pair["kernel"] is None for pair in pairs)


def test_bundled_photographs_stream_and_validate():
    batch = next(iter(loader(SAMPLES / "train", crop=128, batches=1)))
    assert batch["sharp"].float().std() > 10
    pairs = list(validated(SAMPLES / "val", crop=128, tiers=["severe"]))
    assert len(pairs) == 13
    assert np.median([pair["input_psnr"] for pair in pairs]) < 30
