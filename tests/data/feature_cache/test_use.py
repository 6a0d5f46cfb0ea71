"""The feature cache: a hit gives the numbers of the miss, the right folder is found, processes share it."""

import json
import math
import multiprocessing
import os
import shutil
import sqlite3

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.feature_cache.cache import FeatureCache
from data.feature_cache.codec import Stored, dequantise, quantise
from data.feature_cache.spec import CacheSpec, crop_key
from data.feature_cache.store import FILE, Store
from data.workers import worker_context
from tests.data.feature_cache.caches import LEVELS, LIMIT, a_cache, features, fill, keys_of, same
from tests.data.streams import loader

# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_hit_returns_the_very_numbers_of_the_miss(tmp_path, dtype, given):
    cache = a_cache(tmp_path, dtype)
    stored = quantise([f.to(given) for f in features(1)], dtype)
    with cache.writer("rank0") as writer:
        writer.put(keys_of("a"), stored)
    reader = cache.reader()
    assert all(same(reader.get(key), stored, row) for row, key in enumerate(keys_of("a")))
    assert {level.dtype for level in reader.get(keys_of("a")[0])} == {torch.float16}
    assert reader.get(crop_key("b", (0, 3, 64), False)) is None
    assert (reader.stats.hits, reader.stats.misses, reader.stats.corrupt) == (5, 1, 0)


def test_int8_errs_by_half_a_step_of_the_channels_own_scale():
    wide = [f * torch.logspace(-6, 3, f.shape[1]).view(1, -1, 1, 1) for f in features(2)]
    wide[0][:, 1] = 0
    for given, found in zip(wide, dequantise(quantise(wide, "int8")), strict=True):
        step = given.abs().amax((2, 3), keepdim=True) / 127
        rounding = given.abs() * 2**-11 + 2**-24  # of fp16, its smallest numbers included
        assert ((found.float() - given).abs() <= step * 0.5001 + rounding).all()
    assert not dequantise(quantise(wide, "int8"))[0][:, 1].any()


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("bad", [7e4, -7e4, math.inf, -math.inf, math.nan])
def test_numbers_beyond_fp16_are_not_stored_but_used_as_computed(tmp_path, dtype, bad):
    given = features(3)
    given[1][2, 1, 0, 0] = bad
    stored = quantise(given, dtype)
    assert stored.storable.tolist() == [True, True, False, True]
    cache = a_cache(tmp_path, dtype)
    with cache.writer("rank0") as writer:
        writer.put(keys_of("a"), stored)
        writer.flush()
        assert (writer.stats.written, writer.stats.unstorable, writer.stopped) == (3, 1, None)
    reader = cache.reader()
    assert [reader.get(key) is not None for key in keys_of("a")] == [True, True, False, True]
    used = dequantise(stored, given)
    for level, computed, plain in zip(used, given, dequantise(stored), strict=True):
        assert level.dtype == torch.float32
        assert torch.equal(level[2].nan_to_num(), computed[2].nan_to_num())
        assert torch.equal(level[[0, 1, 3]], plain[[0, 1, 3]].float())


def test_the_largest_fp16_number_is_stored():
    largest = [torch.full((1, 2, 1, 3), sign * 65504.0) for sign in (1, -1)]
    for dtype in ("fp16", "int8"):
        stored = quantise(largest, dtype)
        assert stored.storable.all()
        assert all(torch.equal(a.float(), b) for a, b in zip(dequantise(stored), largest, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_features_on_a_gpu_are_stored_and_decoded_as_on_the_cpu(tmp_path, dtype):
    stored = quantise([f.cuda() for f in features(4)], dtype)
    cache = a_cache(tmp_path, dtype)
    with cache.writer("rank0") as writer:
        writer.put(keys_of("a"), stored)
    reader = cache.reader()
    for row, key in enumerate(keys_of("a")):
        assert all(torch.equal(a, b[row].cpu()) for a, b in zip(reader.get(key), dequantise(stored), strict=True))


# -- which folder -----------------------------------------------------------------------------------------------------


def test_any_other_fact_is_another_folder_and_said(tmp_path):
    first = a_cache(tmp_path)
    fill(first, "a")
    facts = {"teacher": "teacher", "levels": LEVELS, "crops": {"boxes": 16}, "dtype": "fp16"}
    changes = {"teacher": "other", "levels": LEVELS[:2], "crops": {"boxes": 8}, "dtype": "int8"}
    for name, value in changes.items():
        other = FeatureCache(tmp_path, CacheSpec(**facts | {name: value}), limit_bytes=LIMIT)
        assert other.folder != first.folder
        assert other.others()[first.folder.name] == [name]
        assert other.reader().get(keys_of("a")[0]) is None
    assert a_cache(tmp_path).folder == first.folder
    assert a_cache(tmp_path).reader().get(keys_of("a")[0]) is not None


def test_records_moved_from_another_folder_are_not_served(tmp_path):
    first, second = a_cache(tmp_path, boxes=16), a_cache(tmp_path, boxes=17)
    fill(first, "a")
    shutil.copy(first.folder / FILE, second.folder / FILE)
    reader = second.reader()
    assert [reader.get(key) for key in keys_of("a")] == [None] * 4
    assert reader.stats.corrupt == 4


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"teacher": "other"}', b"\xff\x00"])
def test_a_folder_that_says_it_is_anothers_is_an_error(tmp_path, content):
    cache = a_cache(tmp_path)
    (cache.folder / "meta.json").write_bytes(content)
    with pytest.raises(DataError, match=r"meta\.json: does not describe this run's features") as error:
        a_cache(tmp_path)
    assert "\n" not in str(error.value)


def test_every_part_of_the_meta_file_is_compared(tmp_path):
    cache = a_cache(tmp_path)
    path = cache.folder / "meta.json"
    whole = json.loads(path.read_text())
    assert whole.keys() >= {"format", "version", "teacher", "levels", "crops", "dtype"}
    for name in whole:
        path.write_text(json.dumps(whole | {name: "x"}))
        with pytest.raises(DataError):
            a_cache(tmp_path)
    path.write_text(json.dumps(whole | {"more": 1}))
    with pytest.raises(DataError):
        a_cache(tmp_path)
    path.write_text(json.dumps(whole))
    a_cache(tmp_path)


def test_key_depends_on_every_part_of_the_crop():
    crops = [("a", (1, 2, 3), False), ("b", (1, 2, 3), False), ("a", (2, 1, 3), False), ("a", (1, 2, 4), False)]
    crops += [("a", (1, 2, 3), True), ("", (1, 2, 3), False), ("ab", (1, 2, 3), False)]
    assert len({crop_key(*crop) for crop in crops}) == len(crops)
    assert len(crop_key(*crops[0])) == 16
    assert crop_key("a", tuple(np.array([1, 2, 3])), np.True_) == crop_key("a", (1, 2, 3), True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int4"}, "int4"),
        ({"levels": ()}, "levels"),
        ({"levels": ((3, 0, 4),)}, "levels"),
        ({"levels": ((3, 4),)}, "levels"),
        ({"crops": {"boxes": {1}}}, "JSON"),
        ({"crops": {"margin": math.nan}}, "JSON"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        CacheSpec(**{"teacher": "t", "levels": LEVELS, "crops": {}, "dtype": "fp16"} | change)


def test_features_of_another_form_are_refused(tmp_path):
    cache = a_cache(tmp_path)
    with cache.writer("rank0") as writer:
        with pytest.raises(DataError, match="not the cache's fp16"):
            writer.put(keys_of("a"), quantise(features(0), "int8"))
        with pytest.raises(DataError, match="not the cache's fp16"):
            writer.put(keys_of("a"), quantise(features(0)[:2], "fp16"))
        with pytest.raises(DataError, match="3 keys for 4 crops"):
            writer.put(keys_of("a", 3), quantise(features(0), "fp16"))
    with pytest.raises(ValueError, match="int4"):
        quantise(features(0), "int4")
    with pytest.raises(ValueError, match="one tensor"):
        quantise([f[:1] if n else f for n, f in enumerate(features(0))], "fp16")


# -- processes --------------------------------------------------------------------------------------------------------


def in_child(reader, key: bytes, results) -> None:
    found = reader.get(key)
    results.put((reader.stats.hits, [level.tolist() for level in found]))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_reader_that_was_used_works_in_child_processes(tmp_path, method):
    cache = a_cache(tmp_path)
    stored = fill(cache, "a")
    reader = cache.reader()
    assert reader.get(keys_of("a")[1]) is not None
    context = worker_context() if method == "forkserver" else multiprocessing.get_context(method)
    results = context.SimpleQueue()
    child = context.Process(target=in_child, args=(reader, keys_of("a")[2], results))
    child.start()
    found = results.get()
    child.join()
    assert found == (1, [level[2].tolist() for level in dequantise(stored)])  # counts of its own
    assert reader.stats.hits == 1


def write_in_child(cache: FeatureCache, name: str, seed: int) -> None:
    fill(cache, name, seed)


def test_records_of_other_processes_are_found_without_reopening(tmp_path):
    cache = a_cache(tmp_path)
    reader = cache.reader()
    assert reader.get(keys_of("a")[0]) is None
    context = worker_context()
    children = [context.Process(target=write_in_child, args=(cache, name, 5)) for name in ("a", "b")]
    for child in children:
        child.start()
    for child in children:
        child.join()
    stored = quantise(features(5), "fp16")
    for name in ("a", "b"):
        assert all(same(reader.get(key), stored, row) for row, key in enumerate(keys_of(name)))


def open_together(root, barrier, results) -> None:
    failed = []
    for n in range(150):
        folder = root / str(n)
        barrier.wait()
        folder.mkdir(exist_ok=True)
        try:
            store = Store(folder, "a fingerprint", 8)
            store.put([os.urandom(16)], [np.zeros(8, np.uint8)])
            store.close()
        except sqlite3.Error as error:
            failed.append(f"{error}")
    results.put(failed)


def test_ranks_that_open_a_new_cache_at_the_same_moment_all_use_it(tmp_path):
    context = worker_context()
    barrier, results = context.Barrier(4), context.SimpleQueue()
    ranks = [context.Process(target=open_together, args=(tmp_path, barrier, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    assert [results.get() for _ in ranks] == [[]] * 4
    for rank in ranks:
        rank.join()
    assert {len(Store(tmp_path / str(n), "a fingerprint", 8)) for n in range(150)} == {4}


def test_a_growing_file_is_followed(tmp_path):
    cache = a_cache(tmp_path)
    reader = cache.reader()
    with cache.writer("rank0") as writer:
        for n in range(5):
            writer.put(keys_of(f"{n}"), quantise(features(n), "fp16"))
            writer.flush()
            assert same(reader.get(keys_of(f"{n}")[3]), quantise(features(n), "fp16"), 3)


def test_the_first_writer_of_a_key_wins(tmp_path):
    cache = a_cache(tmp_path)
    with cache.writer("rank0") as one, cache.writer("rank1") as two:
        one.put(keys_of("a"), quantise(features(1), "fp16"))
        one.flush()
        two.put(keys_of("a"), quantise(features(2), "fp16"))
        two.flush()
        assert (two.stats.written, two.stats.duplicates) == (0, 4)
    stored = quantise(features(1), "fp16")
    assert all(same(cache.reader().get(key), stored, row) for row, key in enumerate(keys_of("a")))


def test_a_key_twice_in_a_batch_is_written_once(tmp_path):
    cache = a_cache(tmp_path)
    with cache.writer("rank0") as writer:
        writer.put(keys_of("a", 2) * 2, quantise(features(1), "fp16"))
        writer.flush()
        assert (writer.stats.written, writer.stats.duplicates) == (2, 2)
    assert same(cache.reader().get(keys_of("a")[1]), quantise(features(1), "fp16"), 1)


# -- in the loader ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_attach_what_is_cached_of_a_batch(tmp_path, make_set, dtype, workers):
    cache = a_cache(tmp_path / "cache", dtype)
    stream = {"crop": 48, "global_batch": 4, "batches": 3, "boxes_per_photo": 2, "margin": 4, "seed": 1}
    wanted: dict[bytes, list[torch.Tensor]] = {}
    with cache.writer("rank0") as writer:
        for number, batch in enumerate(loader(make_set([4, 3]), **stream)):
            crops = zip(batch["image"], batch["box"].tolist(), batch["flip"].tolist(), strict=True)
            keys = [crop_key(image, tuple(box), flip) for image, box, flip in crops]
            stored = quantise(features(number), dtype)
            some = slice(number, None)  # all of the first batch, three of the second, two of the third
            writer.put(keys[some], Stored(stored.payload[some], stored.storable[some], stored.levels, dtype))
            for row, key in list(enumerate(keys))[some]:
                wanted.setdefault(key, [level[row] for level in dequantise(stored)])
    hits = 0
    reader = cache.reader()
    for batch in loader(make_set([4, 3], name="again"), workers=workers, attach=reader.attach, **stream):
        crops = zip(batch["image"], batch["box"].tolist(), batch["flip"].tolist(), strict=True)
        keys = [crop_key(image, tuple(box), flip) for image, box, flip in crops]
        looked_up = batch["features"]
        assert looked_up.hits.dtype == torch.bool
        assert looked_up.hits.tolist() == [key in wanted for key in keys]
        there = [wanted[key] for key in keys if key in wanted]
        for level, found in enumerate(looked_up.levels):
            assert found.shape == (len(there), *LEVELS[level])
            assert all(torch.equal(a, b[level]) for a, b in zip(found, there, strict=True))
        assert (looked_up.bytes, looked_up.corrupt) == (len(there) * cache.spec.record_bytes, 0)
        assert looked_up.seconds > 0
        hits += len(there)
    assert hits >= 9


def test_workers_send_on_batches_without_a_hit(tmp_path, make_set):
    reader = a_cache(tmp_path / "cache").reader()
    for batch in loader(make_set([4]), crop=48, global_batch=2, batches=2, workers=1, attach=reader.attach):
        assert [level.shape for level in batch["features"].levels] == [(0, *level) for level in LEVELS]
        assert not batch["features"].hits.any()


def test_an_empty_cache_attaches_empty_features(tmp_path):
    batch = {"image": ["a", "b"], "box": np.zeros((2, 3), np.int64), "flip": np.zeros(2, bool)}
    a_cache(tmp_path).reader().attach(batch)
    assert [level.shape for level in batch["features"].levels] == [(0, *level) for level in LEVELS]
    assert batch["features"].hits.tolist() == [False, False]
