"""Samples that cannot be read: told, or replaced the same way everywhere, and counted."""

import os
from pathlib import Path

import pytest
import torch

from data.errors import DataError
from data.shards.set import ShardSet
from data.stream.loader import check_bad
from tests.data.stream.test_loader import assert_same, children, merged, wait_until
from tests.data.streams import loader

pytestmark = pytest.mark.slow


def damage(root: Path, number: int) -> str:
    """Flip one byte of a sample's image; returns its key."""
    shards = ShardSet(root)
    shard, row = shards.locate(number)
    offset, size, _ = (int(value) for value in shards.shards[shard].members[shards.image_member(number)][row])
    with open(root / shards.shards[shard].name, "r+b") as file:
        file.seek(offset + size // 2)
        byte = file.read(1)
        file.seek(offset + size // 2)
        file.write(bytes([byte[0] ^ 0x10]))
    return shards.shards[shard].keys[row]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_sample_is_one_clear_line_naming_shard_and_sample(make_set, workers):
    root = make_set([3, 2])
    key, before = damage(root, 1), children()
    with pytest.raises(DataError, match=rf"s_00000\.tar: sample {key}") as caught:
        list(loader(root, workers=workers))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    if workers and Path("/proc").is_dir():  # stopped at once, though `caught` still holds the loader's frames
        assert wait_until(lambda: children() - before == set())


@pytest.mark.parametrize("kind", ["sharp", "pairs"])
def test_bad_samples_below_the_limit_are_replaced_reported_and_the_same_everywhere(make_set, caplog, kind):
    root = make_set([5, 5], kind=kind)
    key = damage(root, 7)
    stream = loader(root, batches=5, max_bad_fraction=0.2)
    batches = list(stream)
    assert all(len(batch["key"]) == 4 for batch in batches)
    assert all(key not in batch["key"] for batch in batches)
    assert stream.bad == {f"{root}/s_00001.tar": {key}}
    assert caplog.text.count("bad sample replaced") == 1
    assert key in caplog.text
    if kind == "pairs":
        assert all(torch.equal(batch["blurry"], 255 - batch["sharp"]) for batch in batches)
    options = {"batches": 5, "max_bad_fraction": 0.5, "world": 2, "workers": 1}
    assert_same(merged([list(loader(root, rank=rank, **options)) for rank in range(2)]), batches)


def test_bad_samples_above_the_limit_stop_the_run_with_counts(make_set):
    root = make_set([5, 5])
    for number in (1, 7, 8):
        damage(root, number)
    with pytest.raises(DataError, match=r"3 bad samples exceed max_bad_fraction 0\.2.*s_00001\.tar: "):
        list(loader(root, batches=5, max_bad_fraction=0.2))


def test_bad_samples_that_ranks_found_apart_are_counted_together(make_set):
    shards = ShardSet(make_set([3, 2]))
    ranks = [{(0, 1)}, {(0, 4), (0, 1)}]
    for found in ranks:
        check_bad(found, [shards], 0.4)
    with pytest.raises(DataError, match=r"3 bad samples exceed .*s_00000.tar: 2, .*s_00001.tar: 1\); found by all"):
        check_bad(ranks[0] | ranks[1] | {(0, 0)}, [shards], 0.4)


def test_torn_and_missing_shards_stop_the_run_or_count_as_bad(make_set):
    root = make_set([8, 1, 1])
    os.truncate(root / "s_00001.tar", 600)
    (root / "s_00002.tar").unlink()
    with pytest.raises(DataError, match="torn shard"):
        loader(root)
    stream = loader(root, batches=5, max_bad_fraction=0.25)
    assert sum(len(batch["key"]) for batch in stream) == 20
    assert {Path(name).name: len(keys) for name, keys in stream.bad.items()} == {"s_00001.tar": 1, "s_00002.tar": 1}


def test_a_set_that_is_all_bad_ends_with_an_error(make_set):
    root = make_set([2])
    for number in range(2):
        damage(root, number)
    with pytest.raises(DataError, match="bad"):
        list(loader(root, max_bad_fraction=0.99))
