"""No damage to the cache's file, and no killed writer, makes a reader return a wrong feature, fail or die."""

import os
import random
import signal
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from data.feature_cache import store
from data.feature_cache.cache import FeatureCache
from data.feature_cache.codec import dequantise, quantise
from data.feature_cache.folders import verify
from data.feature_cache.spec import CacheSpec, crop_key
from data.feature_cache.store import FILE
from data.workers import worker_context

LEVELS = ((2, 1, 2), (1, 3, 1))
KEYS = [crop_key("photo", (n, 0, 32), bool(n % 2)) for n in range(3)]


def small(root: Path, dtype: str) -> tuple[FeatureCache, list[list[torch.Tensor]], Path]:
    """A cache of three records, what they hold, and its file."""
    cache = FeatureCache(root, CacheSpec("teacher", LEVELS, {}, dtype), limit_bytes=1 << 20)
    generator = torch.Generator().manual_seed(7)
    stored = quantise([torch.randn(3, *level, generator=generator) for level in LEVELS], dtype)
    with cache.writer("w") as writer:
        writer.put(KEYS, stored)
    levels = dequantise(stored)
    return cache, [[level[n] for level in levels] for n in range(3)], cache.folder / FILE


def served(cache: FeatureCache, wanted: list[list[torch.Tensor]]) -> tuple[list[bool], int]:
    """Which keys a fresh reader serves, and what it counts as corrupt; fails on a wrong number."""
    reader = cache.reader()
    found = [reader.get(key) for key in KEYS]
    for levels, right in zip(found, wanted, strict=True):
        assert levels is None or all(torch.equal(a, b) for a, b in zip(levels, right, strict=True))
    assert reader.stats.hits + reader.stats.misses == len(KEYS)
    reader.close()
    return [levels is not None for levels in found], reader.stats.corrupt


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_no_flipped_byte_gives_a_wrong_feature_and_one_of_a_payload_is_its_records_alone(tmp_path, monkeypatch, dtype):
    monkeypatch.setitem(store._PRAGMAS, "page_size", 512)  # a file of kilobytes, every byte of which can be tried
    cache, wanted, path = small(tmp_path, dtype)
    whole = path.read_bytes()
    payloads = [whole.index(cache.reader().store.get(key)) for key in KEYS]
    length = cache.spec.payload_bytes
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8 if position % 2 else 0xFF
        path.write_bytes(damaged)
        for beside in cache.reader().store.files()[1:]:
            beside.unlink(missing_ok=True)
        hits, corrupt = served(cache, wanted)
        if any(start <= position < start + length for start in payloads):
            assert hits == [not start <= position < start + length for start in payloads]
            assert corrupt == 1
    path.write_bytes(whole)
    assert served(cache, wanted) == ([True] * 3, 0)


def test_a_file_cut_at_any_length_gives_no_wrong_feature(tmp_path, monkeypatch):
    monkeypatch.setitem(store._PRAGMAS, "page_size", 512)
    cache, wanted, path = small(tmp_path, "fp16")
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        served(cache, wanted)
    for foreign in (b"", b"not a database", os.urandom(5000), whole + os.urandom(700)):
        path.write_bytes(foreign)
        served(cache, wanted)
        with cache.writer("w") as writer:  # says so at most, and goes on
            writer.put(KEYS, quantise([torch.zeros(3, *level) for level in LEVELS], "fp16"))


def test_a_damaged_record_is_written_again(tmp_path):
    cache, wanted, path = small(tmp_path, "fp16")
    whole = path.read_bytes()
    payload = cache.reader().store.get(KEYS[0])
    path.write_bytes(whole.replace(payload, payload[:-9] + bytes([payload[-9] ^ 4]) + payload[-8:]))
    assert served(cache, wanted) == ([False, True, True], 1)
    stored = quantise([torch.stack([levels[n] for levels in wanted]) for n in range(len(LEVELS))], "fp16")
    with cache.writer("again") as writer:
        writer.put(KEYS, stored)
        writer.flush()
        assert (writer.stats.written, writer.stats.duplicates) == (1, 2)
    assert served(cache, wanted) == ([True] * 3, 0)


def test_checksums_are_zlibs_whichever_library_computes_them():
    for size in (0, 1, 63, 64, 65, 4096, 100_001):
        data = np.arange(size, dtype=np.uint32).astype(np.uint8)
        assert store.crc32(data, 12345) == zlib.crc32(data, 12345)


# -- killed writers ---------------------------------------------------------------------------------------------------

BIG, BATCH = ((16, 48, 48), (8, 7, 5)), 12


def record_of(number: int) -> tuple[bytes, list[torch.Tensor]]:
    """Key and features of the number-th record, the same in every process."""
    generator = torch.Generator().manual_seed(number)
    levels = [torch.randn(1, *level, generator=generator) for level in BIG]
    return crop_key("photo", (number, 0, 32), False), levels


def write_for_ever(cache: FeatureCache, start: int) -> None:
    with cache.writer("killed") as writer:
        while True:
            records = [record_of(n) for n in range(start, start + BATCH)]
            levels = [torch.cat([levels[n] for _, levels in records]) for n in range(len(BIG))]
            writer.put([key for key, _ in records], quantise(levels, "fp16"))
            start += BATCH


def test_killed_writers_leave_no_bad_record(tmp_path):
    cache = FeatureCache(tmp_path, CacheSpec("teacher", BIG, {}, "fp16"), limit_bytes=1 << 30)
    context, chance, start = worker_context(), random.Random(5), 0
    for _ in range(8):
        writer = context.Process(target=write_for_ever, args=(cache, start))
        writer.start()
        want, reader, deadline = start + chance.randrange(1, 40), cache.reader(), time.monotonic() + 60
        while time.monotonic() < deadline and len(reader.store) < want:
            time.sleep(chance.random() / 500)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        reader = cache.reader()
        there = [n for n in range(start, start + 400) if reader.store.get(record_of(n)[0]) is not None]
        for number in there:
            key, levels = record_of(number)
            found = reader.get(key)
            assert found is not None
            assert all(torch.equal(a, b[0].half()) for a, b in zip(found, levels, strict=True))
        assert there == list(range(start, start + len(there)))
        assert reader.stats.corrupt == 0
        start += len(there)
    assert start > 8
    (folder,) = verify(tmp_path)
    assert (folder.damaged, folder.records, folder.writing) == ([], start, False)
