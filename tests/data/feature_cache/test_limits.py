"""The feature cache keeps its limits, and no disk, queue or deleted file stops a training run."""

import contextlib
import errno
import logging
import math
import os
import pickle
import resource
import threading

import numpy as np
import pytest

from data.errors import DataError
from data.feature_cache import reader as feature_reader
from data.feature_cache import segments as segments
from data.feature_cache.cache import FeatureCache
from data.feature_cache.codec import quantise
from data.feature_cache.segments import SegmentWriter, stems
from data.feature_cache.spec import CacheSpec, crop_key
from data.feature_cache.writer import FeatureWriter
from data.workers import worker_context
from tests.data.feature_cache.caches import LEVELS, LIMIT, a_cache, features, fill, keys_of, same


def size_of(cache: FeatureCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def test_a_full_cache_keeps_what_it_has(tmp_path, caplog):
    spec = CacheSpec("teacher", LEVELS, {}, "fp16")
    cache = FeatureCache(tmp_path, spec, limit_bytes=20 * spec.record_bytes)
    with cache.writer("rank0") as writer:
        for n in range(10):
            writer.put(keys_of(f"{n}"), quantise(features(n), "fp16"))
            writer.flush()
        assert writer.stats.written == 16
    assert len(warnings_of(caplog)) == 1
    assert "features.limit_gib" in warnings_of(caplog)[0]
    reader = cache.reader()
    assert [reader.get(keys_of(f"{n}")[0]) is not None for n in range(10)] == [n < 4 for n in range(10)]


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
    assert (cache.folder / "meta.json").is_file()
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
        monkeypatch.setattr("data.feature_cache.writer._to_host", broken)
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


def test_a_look_up_that_fails_is_misses_and_one_warning(tmp_path, monkeypatch, caplog):
    cache = a_cache(tmp_path)
    fill(cache, "a")
    room = feature_reader._room_for

    def full(crops, levels):
        if crops:
            raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")
        return room(crops, levels)

    monkeypatch.setattr(feature_reader, "_room_for", full)
    reader = cache.reader()
    for _ in range(2):
        batch = {"image": ["a", "a"], "box": np.array([[0, 3, 64], [1, 3, 64]]), "flip": np.zeros(2, bool)}
        reader.attach(batch)
        assert batch["features"].hits.tolist() == [False, False]
        assert [len(level) for level in batch["features"].levels] == [0, 0, 0]
    (warning,) = warnings_of(caplog)
    assert "shared memory" in warning


def test_a_file_system_that_takes_no_advice_is_read_all_the_same(tmp_path, monkeypatch):
    cache = a_cache(tmp_path)
    stored = fill(cache, "a")

    def refuse(*_):
        raise OSError(errno.EINVAL, "no advice")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    reader = cache.reader()
    reader.segments.refresh()
    reader.segments.drop_from_memory(keys_of("a"))
    _, hits = reader.read_batch(keys_of("a"))
    assert hits == [True] * 4
    assert same(reader.get(keys_of("a")[0]), stored, 0)
