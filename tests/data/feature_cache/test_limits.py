"""The feature cache keeps its limits, and no disk, queue or deleted file stops a training run."""

import errno
import logging
import math
import os
import pickle
import resource
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.feature_cache import reader as feature_reader
from data.feature_cache.cache import FeatureCache
from data.feature_cache.codec import quantise
from data.feature_cache.spec import CacheSpec, crop_key
from data.feature_cache.store import Store
from data.feature_cache.writer import FeatureWriter
from data.workers import worker_context
from tests.data.feature_cache.caches import LEVELS, LIMIT, a_cache, features, fill, keys_of, same

BIG = ((16, 24, 48), (8, 7, 5))


def test_a_full_cache_keeps_what_it_has(tmp_path, caplog):
    spec = CacheSpec("teacher", BIG, {}, "fp16")
    cache = FeatureCache(tmp_path, spec, limit_bytes=1 << 20)
    with cache.writer("rank0") as writer:
        for n in range(10):
            writer.put(keys_of(f"{n}"), quantise(features(n, levels=BIG), "fp16"))
            writer.flush()
        written = writer.stats.written
    assert 20 <= written <= 28  # of 37 kB
    assert len(warnings_of(caplog)) == 1
    assert "features.limit_gib" in warnings_of(caplog)[0]
    reader = cache.reader()
    assert [reader.get(keys_of(f"{n}")[0]) is not None for n in range(10)] == [4 * n < written for n in range(10)]


def test_a_batch_larger_than_the_room_left_is_written_as_far_as_it_goes(tmp_path):
    cache = a_cache(tmp_path, levels=BIG, limit=400_000)
    stored = quantise(features(1, crops=12, levels=BIG), "fp16")
    with cache.writer("rank0") as writer:
        writer.put(keys_of("a", 12), stored)
        writer.flush()
        assert (writer.stats.written, writer.stats.dropped) == (9, 3)
    assert Store(cache.folder, cache.spec.fingerprint, cache.spec.payload_bytes).path.stat().st_size <= 400_000


def test_a_limit_below_eight_records_is_refused(tmp_path):
    with pytest.raises(DataError, match="fewer than 8 records"):
        a_cache(tmp_path, limit=100)


def test_a_deleted_file_is_misses_and_another_in_its_place_is_found(tmp_path):
    cache = a_cache(tmp_path)
    stored = fill(cache, "a")
    reader, before = cache.reader(), len(os.listdir("/proc/self/fd"))
    assert same(reader.get(keys_of("a")[0]), stored, 0)
    for path in reader.store.files():
        path.unlink(missing_ok=True)
    assert reader.get(keys_of("a")[0]) is None
    assert len(os.listdir("/proc/self/fd")) <= before  # its disk space is free again
    fill(cache, "a")
    assert same(reader.get(keys_of("a")[0]), stored, 0)
    assert reader.stats.corrupt == 0


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
def test_a_disk_that_takes_no_more_ends_the_writing_with_one_warning(tmp_path, monkeypatch, caplog, code):
    cache, stored = a_cache(tmp_path), quantise(features(1), "fp16")

    def no_file(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("data.feature_cache.store.os.open", no_file)
    with cache.writer("rank0") as writer:
        for name in "abcd":
            writer.put(keys_of(name), stored)
            writer.flush()
        assert os.strerror(code) in writer.stopped
        assert (writer.stats.written, writer.stats.dropped) == (0, 12)
    monkeypatch.undo()
    assert len(warnings_of(caplog)) == 1
    assert os.strerror(code) in warnings_of(caplog)[0]
    assert cache.reader().get(keys_of("a")[0]) is None
    fill(cache, "e")
    assert cache.reader().get(keys_of("e")[0]) is not None


def limited(cache: FeatureCache, results) -> None:
    """A child whose files cannot grow beyond a few records, as with a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
    with cache.writer("rank0") as writer:
        for n in range(12):
            writer.put(keys_of(f"{n}", 1), quantise(features(n, 1, BIG), "fp16"))
            writer.flush()
        results.put((writer.stats.written, writer.stopped))


def test_a_real_limit_on_file_size_ends_the_writing(tmp_path):
    cache, context = a_cache(tmp_path, levels=BIG), worker_context()
    results = context.SimpleQueue()
    child = context.Process(target=limited, args=(cache, results))
    child.start()
    written, stopped = results.get()
    child.join()
    assert child.exitcode == 0
    assert 0 < written < 12
    assert "disk" in stopped
    reader = cache.reader()
    there = [reader.get(keys_of(f"{n}", 1)[0]) for n in range(12)]
    assert [levels is not None for levels in there] == [n < written for n in range(12)]
    assert all(same(there[n], quantise(features(n, 1, BIG), "fp16"), 0) for n in range(written))
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


def as_another_user(work) -> None:
    """Run `work` as a user that is not root, whom a read-only folder stops."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_read_only_folder_is_read_and_not_written():
    with tempfile.TemporaryDirectory() as place:  # pytest's own is closed to others
        os.chmod(place, 0o755)
        cache = a_cache(Path(place))
        stored = fill(cache, "a")
        for path in (Path(place), *Path(place).rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)

        def work() -> None:
            again = a_cache(Path(place))
            reader = again.reader()
            assert same(reader.get(keys_of("a")[0]), stored, 0)
            assert reader.stats.corrupt == 0
            with again.writer("rank0") as writer:
                writer.put(keys_of("b"), stored)
                writer.flush()
                assert writer.stopped is not None
                assert writer.stats.written == 0

        as_another_user(work)
        cache.folder.chmod(0o755)
        Path(place).chmod(0o755)
        for path in Path(place).rglob("*"):
            path.chmod(0o755)


@pytest.mark.parametrize("size", [(16, 16, 16), (17, 31, 32), (40, 36, 37), (1, 50, 41)])
def test_the_file_stays_below_the_limit_whatever_a_record_s_size(tmp_path, size):
    spec = CacheSpec("t", [size], {}, "fp16")
    cache = FeatureCache(tmp_path, spec, limit_bytes=4 << 20)
    rng = np.random.Generator(np.random.Philox(1))
    with cache.writer("rank0") as writer:
        for number in range(400):
            if writer.stopped is not None:
                break
            data = torch.from_numpy(rng.integers(0, 1000, (1, *size)).astype(np.float32))
            writer.put([f"key {number}".encode().ljust(16)], quantise([data], "fp16"))
            writer.flush()
    held = Store(cache.folder, spec.fingerprint, spec.payload_bytes)
    whole = held.path.stat().st_size
    assert whole <= 4 << 20
    assert whole > 3 << 20
    assert len(held) * spec.payload_bytes > 0.48 * whole  # a record just above half a page is the worst


def test_put_never_waits_and_a_full_queue_drops_and_counts(tmp_path, monkeypatch):
    cache, gate, real = a_cache(tmp_path), threading.Event(), Store.put

    def slow(self, keys, payloads):
        gate.wait()
        real(self, keys, payloads)

    monkeypatch.setattr(Store, "put", slow)
    stored = quantise(features(1), "fp16")
    writer = FeatureWriter(cache.folder, cache.spec, "r", LIMIT, queue_bytes=3 * stored.payload.nbytes)
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
    with FeatureWriter(cache.folder, cache.spec, "r", LIMIT, queue_bytes=1) as writer:
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

    cache = a_cache(tmp_path)
    monkeypatch.setattr(Store, "put", broken)
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
    assert (again.stats.hits, again.store._connection) == (0, None)
    assert again.get(keys_of("a")[0]) is not None


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
    reader.store.drop_from_memory()
    _, hits = reader.read_batch(keys_of("a"))
    assert hits == [True] * 4
    assert same(reader.get(keys_of("a")[0]), stored, 0)
