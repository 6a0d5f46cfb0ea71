"""No damage to the cache's files, and no killed writer, makes a reader return a wrong feature or fail."""

import os
import random
import signal
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from data.feature_cache import segments as segments
from data.feature_cache.cache import FeatureCache
from data.feature_cache.codec import dequantise, quantise
from data.feature_cache.folders import verify
from data.feature_cache.segments import ENTRY_BYTES, SegmentWriter, stems
from data.feature_cache.spec import CacheSpec, crop_key
from data.workers import worker_context

LEVELS = ((2, 1, 2), (1, 3, 1))
KEYS = [crop_key("photo", (n, 0, 32), bool(n % 2)) for n in range(3)]


def small(root: Path, dtype: str) -> tuple[FeatureCache, list[list[torch.Tensor]], Path]:
    """A cache of three records, what they hold, and the path of their segment without its ending."""
    cache = FeatureCache(root, CacheSpec("teacher", LEVELS, {}, dtype), limit_bytes=1 << 20)
    generator = torch.Generator().manual_seed(7)
    stored = quantise([torch.randn(3, *level, generator=generator) for level in LEVELS], dtype)
    with cache.writer("w") as writer:
        writer.put(KEYS, stored)
    levels = dequantise(stored)
    (stem,) = stems(cache.folder)
    return cache, [[level[n] for level in levels] for n in range(3)], cache.folder / stem


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
@pytest.mark.parametrize("kind", ["seg", "idx"])
def test_any_flipped_byte_makes_its_record_a_miss_that_is_counted(tmp_path, dtype, kind):
    cache, wanted, stem = small(tmp_path, dtype)
    path = stem.with_name(f"{stem.name}.{kind}")
    whole = path.read_bytes()
    size = cache.spec.record_bytes if kind == "seg" else ENTRY_BYTES
    assert len(whole) == 3 * size
    for position in range(len(whole)):
        for mask in (1 << position % 8, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= mask
            path.write_bytes(damaged)
            hits, corrupt = served(cache, wanted)
            assert hits == [record != position // size for record in range(3)], position
            assert corrupt == 1
    path.write_bytes(whole)
    assert served(cache, wanted) == ([True] * 3, 0)


@pytest.mark.parametrize("kind", ["seg", "idx"])
def test_a_file_cut_at_any_length_serves_the_records_before_the_cut(tmp_path, kind):
    cache, wanted, stem = small(tmp_path, "fp16")
    path = stem.with_name(f"{stem.name}.{kind}")
    whole = path.read_bytes()
    size = len(whole) // 3
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        hits, corrupt = served(cache, wanted)
        left = length // size
        assert hits == [record < left for record in range(3)]
        # A torn index is what a killed writer leaves; an index that promises more than its segment has is damage.
        assert corrupt == (3 - left if kind == "seg" else 0)


def test_foreign_bytes_and_files_are_ignored(tmp_path):
    cache, wanted, stem = small(tmp_path, "fp16")
    seg, idx = (stem.with_name(f"{stem.name}.{kind}") for kind in ("seg", "idx"))
    with open(seg, "ab") as file:
        file.write(b"tail of a killed writer")
    with open(idx, "ab") as file:
        file.write(b"torn")
    for name in ("notes.txt", "x.idx", ".idx", f"{stem.name}.idx.bak", f"{'9' * 20}-h-1-0-a.seg"):
        (cache.folder / name).write_bytes(os.urandom(200))
    (cache.folder / f"{'8' * 20}-h-1-0-a.idx").mkdir()
    (cache.folder / f"{'7' * 20}-h-1-0-a.idx").symlink_to("nowhere")
    assert served(cache, wanted) == ([True] * 3, 0)
    (cache.folder / f"{'6' * 20}-h-1-0-a.idx").write_bytes(bytes(100))  # holes of a crashed machine
    (cache.folder / f"{'5' * 20}-h-1-0-a.idx").write_bytes(os.urandom(96))
    assert served(cache, wanted) == ([True] * 3, 6)


def test_an_index_without_its_segment_and_a_segment_without_its_index_are_misses(tmp_path):
    cache, wanted, stem = small(tmp_path, "fp16")
    seg, idx = (stem.with_name(f"{stem.name}.{kind}") for kind in ("seg", "idx"))
    whole = idx.read_bytes()
    seg.rename(tmp_path / "seg")
    assert served(cache, wanted) == ([False] * 3, 0)
    (tmp_path / "seg").rename(seg)
    idx.unlink()
    assert served(cache, wanted) == ([False] * 3, 0)
    idx.write_bytes(whole)
    assert served(cache, wanted) == ([True] * 3, 0)


def test_entries_and_records_in_another_order_are_not_believed(tmp_path):
    cache, wanted, stem = small(tmp_path, "fp16")
    seg, idx = (stem.with_name(f"{stem.name}.{kind}") for kind in ("seg", "idx"))
    size, whole, entries = cache.spec.record_bytes, seg.read_bytes(), idx.read_bytes()
    seg.write_bytes(whole[size:] + whole[:size])  # each record is sound, none is where its entry says
    assert served(cache, wanted) == ([False] * 3, 3)
    seg.write_bytes(whole)
    idx.write_bytes(entries[ENTRY_BYTES:] + entries[:ENTRY_BYTES])
    assert served(cache, wanted) == ([False] * 3, 3)


def test_a_damaged_record_is_written_again_and_the_second_copy_served(tmp_path):
    cache, wanted, stem = small(tmp_path, "fp16")
    seg = stem.with_name(f"{stem.name}.seg")
    damaged = bytearray(seg.read_bytes())
    damaged[cache.spec.record_bytes - 1] ^= 4
    seg.write_bytes(damaged)
    assert served(cache, wanted) == ([False, True, True], 1)
    stored = quantise([torch.stack([levels[n] for levels in wanted]) for n in range(len(LEVELS))], "fp16")
    with cache.writer("again") as writer:
        writer.put(KEYS, stored)
        writer.flush()
        assert (writer.stats.written, writer.stats.duplicates) == (1, 2)
    assert served(cache, wanted) == ([True] * 3, 1)


def test_an_entry_that_is_being_written_is_waited_for(tmp_path):
    cache, _, _ = small(tmp_path, "fp16")
    writer = SegmentWriter(cache.folder, cache.spec.layout, "slow")
    payload = np.zeros(cache.spec.layout.payload_bytes, np.uint8)
    key = crop_key("late", (0, 0, 32), False)
    writer.append([key], [payload])
    path = cache.folder / f"{writer.stem}.idx"
    entry = path.read_bytes()
    path.write_bytes(bytes(ENTRY_BYTES))
    reader = cache.reader()
    reader.segments.refresh()
    assert key not in reader.segments
    assert reader.segments.corrupt == 0
    path.write_bytes(entry[:20])
    reader.segments.refresh()
    path.write_bytes(entry)
    reader.segments.refresh()
    assert reader.get(key) is not None
    writer.close()


def test_checksums_are_zlibs_whichever_library_computes_them():
    for size in (0, 1, 63, 64, 65, 4096, 100_001):
        data = np.arange(size, dtype=np.uint32).astype(np.uint8)
        assert segments.crc32(data, 12345) == zlib.crc32(data, 12345)


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
        before = set(stems(cache.folder))
        writer = context.Process(target=write_for_ever, args=(cache, start))
        writer.start()
        want = chance.randrange(1, 40 * cache.spec.record_bytes)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            new = [cache.folder / f"{stem}.seg" for stem in set(stems(cache.folder)) - before]
            if new and new[0].exists() and new[0].stat().st_size >= want:
                break
            time.sleep(chance.random() / 500)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        reader = cache.reader()
        reader.segments.refresh()
        there = [n for n in range(start, start + 400) if record_of(n)[0] in reader.segments]
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
    assert (folder.damaged, folder.records, folder.writers) == ([], start, 0)
