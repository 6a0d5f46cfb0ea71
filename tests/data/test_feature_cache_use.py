"""The feature cache: a hit gives the numbers of the miss, processes share it, it keeps its limits and never fails."""

import contextlib
import errno
import json
import logging
import math
import multiprocessing
import os
import pickle
import resource
import threading

import numpy as np
import pytest
import torch

import data.feature_segments as segments
from data.blur import BlurConfig
from data.errors import DataError
from data.feature_cache import CacheSpec, FeatureCache, crop_key, dequantise, quantise
from data.feature_codec import Stored
from data.feature_segments import SegmentWriter, stems
from data.feature_writer import FeatureWriter
from data.loader import PairLoader
from data.workers import worker_context

LEVELS = ((3, 5, 4), (2, 3, 1), (7, 1, 1))
LIMIT = 1 << 26


def features(seed: int, crops: int = 4, levels=LEVELS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(crops, *level, generator=generator) * 3 for level in levels]


def keys_of(name: str, crops: int = 4) -> list[bytes]:
    return [crop_key(name, (top, 3, 64), False) for top in range(crops)]


def a_cache(root, dtype: str = "fp16", levels=LEVELS, limit: int = LIMIT, **facts) -> FeatureCache:
    return FeatureCache(root, CacheSpec("teacher", levels, {"boxes": 16, **facts}, dtype), limit_bytes=limit)


def fill(cache: FeatureCache, name: str, seed: int = 0, crops: int = 4) -> Stored:
    stored = quantise(features(seed, crops, cache.spec.levels), cache.spec.dtype)
    with cache.writer("test") as writer:
        writer.put(keys_of(name, crops), stored)
    return stored


def same(found: list[torch.Tensor] | None, stored: Stored, row: int) -> bool:
    levels = dequantise(stored)
    return found is not None and all(torch.equal(a, b[row]) for a, b in zip(found, levels, strict=True))


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
    for path in first.folder.iterdir():
        if path.suffix in (".seg", ".idx"):
            os.rename(path, second.folder / path.name)
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


def test_records_of_other_processes_are_found_without_reopening(tmp_path, monkeypatch):
    monkeypatch.setattr("data.feature_cache._LOOK_AGAIN_S", 0.0)
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
    assert len(stems(cache.folder)) == 2


def test_a_growing_segment_is_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("data.feature_cache._LOOK_AGAIN_S", 0.0)
    cache = a_cache(tmp_path)
    reader = cache.reader()
    with cache.writer("rank0") as writer:
        for n in range(5):
            writer.put(keys_of(f"{n}"), quantise(features(n), "fp16"))
            writer.flush()
            assert same(reader.get(keys_of(f"{n}")[3]), quantise(features(n), "fp16"), 3)
        assert len(stems(cache.folder)) == 1


def test_looks_for_new_records_are_rate_limited(tmp_path, monkeypatch):
    cache = a_cache(tmp_path)
    reader = cache.reader()
    looks = []
    monkeypatch.setattr(reader.segments, "refresh", lambda: looks.append(1))
    for _ in range(50):
        reader.get(keys_of("a")[0])
    assert len(looks) < 5


def test_the_first_writer_of_a_key_wins(tmp_path):
    cache = a_cache(tmp_path)
    with cache.writer("rank0") as one, cache.writer("rank1") as two:
        one.put(keys_of("a"), quantise(features(1), "fp16"))
        one.flush()
        two.put(keys_of("a"), quantise(features(2), "fp16"))
        two.flush()
        assert (two.stats.written, two.stats.duplicates) == (0, 4)
    # Both at the same moment: neither saw the other's.
    for seed in (3, 4):
        writer = SegmentWriter(cache.folder, cache.spec.layout, "race")
        writer.append(keys_of("b"), list(quantise(features(seed), "fp16").payload.numpy()))
        writer.close()
    reader = cache.reader()
    for name, seed in (("a", 1), ("b", 3)):
        stored = quantise(features(seed), "fp16")
        assert all(same(reader.get(key), stored, row) for row, key in enumerate(keys_of(name)))


def test_a_key_twice_in_a_batch_is_written_once(tmp_path):
    cache = a_cache(tmp_path)
    with cache.writer("rank0") as writer:
        writer.put(keys_of("a", 2) * 2, quantise(features(1), "fp16"))
        writer.flush()
        assert (writer.stats.written, writer.stats.duplicates) == (2, 2)
    assert same(cache.reader().get(keys_of("a")[1]), quantise(features(1), "fp16"), 1)


def test_writers_of_one_name_never_share_a_file(tmp_path):
    cache = a_cache(tmp_path)
    writers = [SegmentWriter(cache.folder, cache.spec.layout, "rank0/../x y") for _ in range(20)]
    assert len({writer.stem for writer in writers}) == len(stems(cache.folder)) == 20
    for writer in writers:
        writer.close()


# -- in the loader ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_attach_what_is_cached_of_a_batch(tmp_path, make_set, dtype, workers):
    cache = a_cache(tmp_path / "cache", dtype)
    stream = {"crop": 48, "global_batch": 4, "batches": 3, "boxes": 2, "margin": 4, "seed": 1}
    wanted: dict[bytes, list[torch.Tensor]] = {}
    with cache.writer("rank0") as writer:
        for number, batch in enumerate(PairLoader(make_set([4, 3]), BlurConfig(), **stream)):
            crops = zip(batch["image"], batch["box"].tolist(), batch["flip"].tolist(), strict=True)
            keys = [crop_key(image, tuple(box), flip) for image, box, flip in crops]
            stored = quantise(features(number), dtype)
            some = slice(number, None)  # all of the first batch, three of the second, two of the third
            writer.put(keys[some], Stored(stored.payload[some], stored.storable[some], stored.levels, dtype))
            for row, key in list(enumerate(keys))[some]:
                wanted.setdefault(key, [level[row] for level in dequantise(stored)])
    hits = 0
    loader = PairLoader(
        make_set([4, 3], name="again"), BlurConfig(), workers=workers, attach=cache.reader().attach, **stream
    )
    for batch in loader:
        crops = zip(batch["image"], batch["box"].tolist(), batch["flip"].tolist(), strict=True)
        keys = [crop_key(image, tuple(box), flip) for image, box, flip in crops]
        assert batch["feature_hits"].dtype == torch.bool
        assert batch["feature_hits"].tolist() == [key in wanted for key in keys]
        there = [wanted[key] for key in keys if key in wanted]
        for level, found in enumerate(batch["features"]):
            assert found.shape == (len(there), *LEVELS[level])
            assert all(torch.equal(a, b[level]) for a, b in zip(found, there, strict=True))
        assert batch["feature_read"]["bytes"] == len(there) * cache.spec.record_bytes
        assert batch["feature_read"]["corrupt"] == 0
        assert batch["feature_read"]["seconds"] > 0
        hits += len(there)
    assert hits >= 9


def test_workers_send_on_batches_without_a_hit(tmp_path, make_set):
    reader = a_cache(tmp_path / "cache").reader()
    for batch in PairLoader(
        make_set([4]), BlurConfig(), crop=48, global_batch=2, batches=2, workers=1, attach=reader.attach
    ):
        assert [level.shape for level in batch["features"]] == [(0, *level) for level in LEVELS]
        assert not batch["feature_hits"].any()


def test_an_empty_cache_attaches_empty_features(tmp_path):
    batch = {"image": ["a", "b"], "box": np.zeros((2, 3), np.int64), "flip": np.zeros(2, bool)}
    a_cache(tmp_path).reader().attach(batch)
    assert [level.shape for level in batch["features"]] == [(0, *level) for level in LEVELS]
    assert batch["feature_hits"].tolist() == [False, False]


# -- limits and trouble -----------------------------------------------------------------------------------------------


def size_of(cache: FeatureCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def test_the_oldest_segments_go_when_the_limit_is_reached(tmp_path, monkeypatch):
    monkeypatch.setattr("data.feature_cache._LOOK_AGAIN_S", 0.0)
    record = a_cache(tmp_path).spec.record_bytes
    cache = a_cache(tmp_path, limit=40 * record)
    other = a_cache(tmp_path, boxes=3)
    fill(other, "other")
    reader = cache.reader()
    with cache.writer("rank0") as one, cache.writer("rank1") as two:
        for n in range(30):
            for writer in (one, two):
                writer.put(keys_of(f"{writer.name}{n}"), quantise(features(n), "fp16"))
                writer.flush()
                assert same(reader.get(keys_of(f"{writer.name}{n}")[0]), quantise(features(n), "fp16"), 0)
                assert size_of(cache) <= cache.limit_bytes + 2048  # meta.json beside the segments
        assert one.stats.removed_segments + two.stats.removed_segments > 10
        assert one.stats.written == two.stats.written == 120
    gone = [n for n in range(30) if reader.get(keys_of(f"rank0{n}")[0]) is None]
    assert gone == list(range(len(gone)))
    assert len(gone) == 26  # no more than had to go
    assert reader.stats.corrupt == 0
    assert other.reader().get(keys_of("other")[0]) is not None


def test_segments_that_a_writer_holds_go_last(tmp_path):
    record = a_cache(tmp_path).spec.record_bytes
    cache = a_cache(tmp_path, limit=40 * record)
    with cache.writer("slow") as slow, cache.writer("fast") as fast:
        slow.put(keys_of("slow", 1), quantise(features(0, 1), "fp16"))
        slow.flush()
        for n in range(20):
            fast.put(keys_of(f"{n}"), quantise(features(n), "fp16"))
            fast.flush()
        assert cache.reader().get(keys_of("slow", 1)[0]) is not None
        assert cache.reader().get(keys_of("5")[0]) is None


def test_a_full_cache_can_keep_what_it_has_instead(tmp_path, caplog):
    spec = CacheSpec("teacher", LEVELS, {}, "fp16")
    cache = FeatureCache(tmp_path, spec, limit_bytes=20 * spec.record_bytes, when_full="stop")
    with cache.writer("rank0") as writer:
        for n in range(10):
            writer.put(keys_of(f"{n}"), quantise(features(n), "fp16"))
            writer.flush()
        assert (writer.stats.written, writer.stats.removed_segments) == (16, 0)
    assert len(warnings_of(caplog)) == 1
    assert "features.limit_gib" in warnings_of(caplog)[0]
    reader = cache.reader()
    assert [reader.get(keys_of(f"{n}")[0]) is not None for n in range(10)] == [n < 4 for n in range(10)]
    with pytest.raises(DataError, match="newest"):
        FeatureCache(tmp_path, spec, limit_bytes=LIMIT, when_full="newest")


def test_a_batch_larger_than_a_segment_is_split(tmp_path):
    cache = a_cache(tmp_path, limit=16 * a_cache(tmp_path).spec.record_bytes)
    stored = quantise(features(1, crops=12), "fp16")
    with cache.writer("rank0") as writer:
        writer.put(keys_of("a", 12), stored)
    reader = cache.reader()
    assert same(reader.get(keys_of("a", 12)[11]), stored, 11)
    assert size_of(cache) <= cache.limit_bytes + 2048


def test_a_limit_below_eight_records_is_refused(tmp_path):
    with pytest.raises(DataError, match="fewer than 8 records"):
        a_cache(tmp_path, limit=100)


def test_a_deleted_segment_is_a_miss_and_an_open_one_stays_readable(tmp_path, monkeypatch):
    cache = a_cache(tmp_path)
    stored = fill(cache, "a")
    fill(cache, "b")
    opened, fresh = cache.reader(), cache.reader()
    assert same(opened.get(keys_of("a")[0]), stored, 0)
    fresh.segments.refresh()
    fresh._looked = opened._looked = math.inf  # no look in between
    for stem in stems(cache.folder):
        segments.remove_segment(cache.folder, stem)
    assert same(opened.get(keys_of("a")[1]), stored, 1)
    assert fresh.get(keys_of("a")[1]) is None
    assert fresh.stats.corrupt == opened.stats.corrupt == 0
    opened.segments.refresh()
    assert opened.get(keys_of("a")[1]) is None
    assert not opened.segments._files  # their disk space is free again


def test_writing_goes_on_when_the_folder_is_deleted(tmp_path):
    cache = a_cache(tmp_path)
    with cache.writer("rank0") as writer:
        writer.put(keys_of("a"), quantise(features(1), "fp16"))
        writer.flush()
        for path in cache.folder.iterdir():
            path.unlink()
        cache.folder.rmdir()
        writer.put(keys_of("a"), quantise(features(1), "fp16"))
        writer.flush()
        assert writer.stopped is None
    assert a_cache(tmp_path).reader().get(keys_of("a")[0]) is not None


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("part", ["payload", "index", "start"])
def test_a_disk_that_takes_no_more_ends_the_writing_with_one_warning(tmp_path, monkeypatch, caplog, code, part):
    cache = a_cache(tmp_path)
    stored, real, entries = quantise(features(1), "fp16"), os.pwritev, 4 * segments.ENTRY_BYTES
    batch = 4 * cache.spec.record_bytes
    # Of the second batch a part of a record fits, or its records and a part of their entries.
    room = batch + entries + 300 if part == "payload" else 2 * batch + entries + 50

    def filling(file, buffers, offset):
        nonlocal room
        if room == 0:
            raise OSError(code, os.strerror(code))
        whole = b"".join(map(bytes, buffers))[:room]
        room -= len(whole)
        return real(file, [whole], offset)

    if part == "start":

        def no_file(*arguments):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(segments.os, "open", no_file)
    else:
        monkeypatch.setattr(segments.os, "pwritev", filling)
    with cache.writer("rank0") as writer:
        for name in "abcd":
            writer.put(keys_of(name), stored)
            writer.flush()
        assert os.strerror(code) in writer.stopped
        assert writer.stats.written == (0 if part == "start" else 4)
        assert writer.stats.dropped >= 8
    monkeypatch.undo()
    assert len(warnings_of(caplog)) == 1
    assert os.strerror(code) in warnings_of(caplog)[0]
    reader = cache.reader()
    for row, key in enumerate(keys_of("a")):
        assert same(reader.get(key), stored, row) == (part != "start")
    assert all(reader.get(key) is None or same(reader.get(key), stored, n) for n, key in enumerate(keys_of("b")))
    assert reader.stats.corrupt == 0
    fill(cache, "e")
    assert cache.reader().get(keys_of("e")[0]) is not None


def limited(cache: FeatureCache, results) -> None:
    """A child whose files cannot grow beyond 2.5 records, as with a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (cache.spec.record_bytes * 5 // 2,) * 2)
    with cache.writer("rank0") as writer:
        for n in range(4):
            writer.put(keys_of(f"{n}", 1), quantise(features(n, 1), "fp16"))
            writer.flush()
        results.put((writer.stats.written, writer.stopped))


def test_a_real_limit_on_file_size_ends_the_writing(tmp_path):
    cache, context = a_cache(tmp_path), worker_context()
    results = context.SimpleQueue()
    child = context.Process(target=limited, args=(cache, results))
    child.start()
    written, stopped = results.get()
    child.join()
    assert child.exitcode == 0
    assert written == 2
    assert os.strerror(errno.EFBIG) in stopped
    reader = cache.reader()
    assert [reader.get(keys_of(f"{n}", 1)[0]) is not None for n in range(4)] == [True, True, False, False]
    assert reader.stats.corrupt == 0


def test_a_folder_that_cannot_be_made_is_a_warning_and_misses(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = a_cache(tmp_path / "file" / "cache")
    assert cache.problem is not None
    with cache.writer("rank0") as writer:
        writer.put(keys_of("a"), quantise(features(1), "fp16"))
        writer.flush()
        assert writer.stats.dropped == 4
    assert len(warnings_of(caplog)) == 1
    assert cache.reader().get(keys_of("a")[0]) is None
    assert cache.probe(keys_of("a")) == (math.inf, 0.0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_a_read_only_folder_is_read_and_not_written(tmp_path, caplog):
    cache = a_cache(tmp_path)
    stored = fill(cache, "a")
    cache.folder.chmod(0o500)
    try:
        again = a_cache(tmp_path)
        assert same(again.reader().get(keys_of("a")[0]), stored, 0)
        with again.writer("rank0") as writer:
            writer.put(keys_of("b"), stored)
    finally:
        cache.folder.chmod(0o700)
    assert len(warnings_of(caplog)) == 1


def test_put_never_waits_and_a_full_queue_drops_and_counts(tmp_path, monkeypatch):
    cache, gate, real = a_cache(tmp_path), threading.Event(), SegmentWriter.append

    def slow(self, keys, payloads):
        gate.wait()
        real(self, keys, payloads)

    monkeypatch.setattr(SegmentWriter, "append", slow)
    stored = quantise(features(1), "fp16")
    writer = FeatureWriter(cache.folder, cache.spec.layout, "r", LIMIT, queue_bytes=3 * stored.payload.nbytes)
    for n in range(10):
        writer.put(keys_of(f"{n}"), stored)  # returns while the disk hangs
    assert writer.stats.dropped == 28
    gate.set()
    writer.flush()
    assert writer.stats.written == 12
    writer.put(keys_of("later"), stored)
    writer.close()
    assert writer.stats.written == 16
    assert len(cache.reader().get(keys_of("later")[0])) == len(LEVELS)


def test_a_batch_larger_than_the_queue_is_taken_when_it_is_empty(tmp_path):
    cache = a_cache(tmp_path)
    with FeatureWriter(cache.folder, cache.spec.layout, "r", LIMIT, queue_bytes=1) as writer:
        writer.put(keys_of("a"), quantise(features(1), "fp16"))
        writer.flush()
        assert writer.stats.written == 4


def test_a_copy_from_the_gpu_that_fails_is_a_warning_too(tmp_path, monkeypatch, caplog):
    def broken(_):
        raise RuntimeError("CUDA error: out of memory")

    cache = a_cache(tmp_path)
    with cache.writer("rank0") as writer:
        writer.put(keys_of("a"), quantise(features(1), "fp16"))
        writer.flush()
        monkeypatch.setattr("data.feature_writer._to_host", broken)
        for name in "bc":
            writer.put(keys_of(name), quantise(features(1), "fp16"))
        writer.flush()
        assert (writer.stats.dropped, writer._waiting_bytes) == (8, 0)
    assert len(warnings_of(caplog)) == 1


def test_an_unforeseen_error_of_the_thread_is_a_warning_too(tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no idea")

    monkeypatch.setattr(SegmentWriter, "append", broken)
    cache = a_cache(tmp_path)
    with cache.writer("rank0") as writer:
        writer.put(keys_of("a"), quantise(features(1), "fp16"))
        writer.flush()
        assert writer.stopped == "RuntimeError: no idea"
    assert len(warnings_of(caplog)) == 1


def test_probe_reads_from_the_disk_what_was_put(tmp_path):
    cache = a_cache(tmp_path)
    with cache.writer("rank0") as writer:
        for n in range(8):
            writer.put(keys_of(f"{n}"), quantise(features(n), "fp16"))
        keys = [key for n in range(8) for key in keys_of(f"{n}")]
        ms, rate = cache.probe(keys)
    assert ms > 0
    assert rate == pytest.approx(cache.spec.record_bytes / ms / 1e3)
    assert cache.probe([crop_key("never", (0, 0, 1), False)]) == (math.inf, 0.0)


def test_a_pickled_reader_carries_no_open_file(tmp_path):
    cache = a_cache(tmp_path)
    fill(cache, "a")
    reader = cache.reader()
    reader.get(keys_of("a")[0])
    again = pickle.loads(pickle.dumps(reader))
    assert (again.stats.hits, len(again.segments)) == (0, 0)
    assert again.get(keys_of("a")[0]) is not None


def test_many_segments_do_not_use_up_file_descriptors(tmp_path):
    cache = a_cache(tmp_path)
    stored = quantise(features(1, 1), "fp16")
    for n in range(200):
        writer = SegmentWriter(cache.folder, cache.spec.layout, "r")
        with contextlib.closing(writer):
            writer.append(keys_of(f"{n}", 1), list(stored.payload.numpy()))
    reader, before = cache.reader(), len(os.listdir("/proc/self/fd"))
    assert all(same(reader.get(keys_of(f"{n}", 1)[0]), stored, 0) for n in range(200))
    assert len(os.listdir("/proc/self/fd")) < before + 150
    reader.close()
    assert len(os.listdir("/proc/self/fd")) <= before
