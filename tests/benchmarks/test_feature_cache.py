"""Benchmark of the feature cache against LMDB and diskcache: two writer processes, then random reads, in one run.

`pytest --benchmark-only tests/benchmarks/test_feature_cache.py -s`; peers are measured where they are installed: `pip
install lmdb diskcache`. A record is what efficientnet_lite0's four levels of a 192 px crop take in fp16, 212 kB. All
stores get batches of 16 and give batches of level tensors back. Ours writes and checks every record's crc32 in that
time; of the peers only `lmdb_checked` does, the others check nothing. Ours is not synced to the disk (a crashed machine
loses records, which cost a recomputation), LMDB is measured synced, as it comes, and not synced. Rounds of all stores
are interleaved; ratios are of medians. Warm reads are CPU seconds, so a busy machine does not change what is compared.

A writer process writes and deletes another file just before it is timed. A virtual machine that reports free memory to
its host (virtio-balloon) waits about 5 µs for the host at each page it touches next, several times what writing the
page costs; a training run that keeps its page cache full does not.
"""

import contextlib
import importlib.util
import math
import os
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.feature_cache.cache import FeatureCache
from data.feature_cache.codec import decode, dequantise, quantise
from data.feature_cache.spec import CacheSpec, crop_key
from data.feature_cache.store import crc32
from data.workers import worker_context

LEVELS = ((24, 48, 48), (40, 24, 24), (112, 12, 12), (320, 6, 6))
SPEC = CacheSpec("benchmark", LEVELS, {"boxes": 16}, "fp16")
BATCH, BATCHES, WRITERS, ROUNDS = 16, 20, 2, 3
RECORDS = BATCH * BATCHES * WRITERS
LIMIT = 8 << 30
PEERS = {"lmdb_synced": "lmdb", "lmdb_unsynced": "lmdb", "lmdb_checked": "lmdb", "diskcache": "diskcache"}


def keys_of(rank: int, batch: int) -> list[bytes]:
    return [crop_key(f"photo-{rank}", (batch, n, 192), False) for n in range(BATCH)]


def all_keys() -> list[bytes]:
    return [key for rank in range(WRITERS) for batch in range(BATCHES) for key in keys_of(rank, batch)]


def a_batch(dtype: str = "fp16"):
    generator = torch.Generator().manual_seed(1)
    return quantise([torch.randn(BATCH, *level, generator=generator) for level in LEVELS], dtype)


# -- stores -----------------------------------------------------------------------------------------------------------


class Ours:
    def __init__(self, folder: Path, rank: int = 0, dtype: str = "fp16") -> None:
        spec = CacheSpec(SPEC.teacher, LEVELS, SPEC.crops, dtype)
        self.cache = FeatureCache(folder, spec, limit_bytes=LIMIT)
        self.writer, self.reader, self.stored = self.cache.writer(f"rank{rank}"), self.cache.reader(), a_batch(dtype)

    def write(self, keys: list[bytes]) -> None:
        self.writer.put(keys, self.stored)

    def close(self) -> None:
        self.writer.close()
        assert self.writer.stats.dropped == 0

    def read(self, keys: list[bytes]) -> list[torch.Tensor]:
        levels, hits = self.reader.read_batch(keys)
        assert all(hits)
        return levels


class Peer:
    """Common to the peers: whole payloads are their values."""

    def rows(self) -> list[memoryview]:
        self.payload = a_batch().payload.numpy()
        return [memoryview(row) for row in self.payload]

    def read(self, keys: list[bytes]) -> list[torch.Tensor]:
        """Straight into one array a batch: no copy more than ours."""
        payload = np.empty((len(keys), SPEC.payload_bytes), np.uint8)
        for row, value, crc in self.values(keys):
            payload[row] = np.frombuffer(value, np.uint8)
            assert crc is None or crc32(payload[row]) == int.from_bytes(crc, "little")
        return decode(torch.from_numpy(payload), LEVELS, "fp16")


class LMDB(Peer):
    def __init__(self, folder: Path, kind: str) -> None:
        import lmdb

        self.env = lmdb.open(str(folder), map_size=LIMIT, sync=kind == "lmdb_synced")
        self.batch, self.checked = self.rows(), kind == "lmdb_checked"

    def write(self, keys: list[bytes]) -> None:
        with self.env.begin(write=True) as transaction:
            for key, value in zip(keys, self.batch, strict=True):
                transaction.put(key, value)
                if self.checked:
                    transaction.put(key + b"crc32", crc32(value).to_bytes(4, "little"))

    def close(self) -> None:
        self.env.close()

    def values(self, keys: list[bytes]):
        with self.env.begin(buffers=True) as transaction:
            for row, key in enumerate(keys):
                yield row, transaction.get(key), transaction.get(key + b"crc32") if self.checked else None


class DiskCache(Peer):
    def __init__(self, folder: Path) -> None:
        import diskcache

        self.cache = diskcache.Cache(str(folder), size_limit=LIMIT, timeout=120)
        self.batch = [bytes(row) for row in self.rows()]

    def write(self, keys: list[bytes]) -> None:
        for key, value in zip(keys, self.batch, strict=True):
            self.cache.set(key, value)

    def close(self) -> None:
        self.cache.close()

    def values(self, keys: list[bytes]):
        for row, key in enumerate(keys):
            yield row, self.cache.get(key), None


def a_store(name: str, folder: Path, rank: int = 0):
    if name.startswith("ours"):
        return Ours(folder, rank, "int8" if name == "ours_int8" else "fp16")
    return DiskCache(folder) if name == "diskcache" else LMDB(folder, name)


# -- measuring --------------------------------------------------------------------------------------------------------


def have_memory_at_hand(path: Path, barrier) -> None:
    """Take as much page cache as one writer will, and give it back when all writers have theirs; the guest's kernel
    keeps it for some 2 s."""
    batch, file = bytes(BATCH * SPEC.record_bytes), os.open(path, os.O_WRONLY | os.O_CREAT)
    for number in range(BATCHES):
        os.pwrite(file, batch, number * len(batch))
    os.close(file)
    barrier.wait(60)
    path.unlink()


def write_share(name: str, folder: Path, rank: int, barrier) -> None:
    """One writer process; what lies between the two barriers is timed."""
    torch.set_num_threads(1)
    store = a_store(name, folder, rank)
    keys = [keys_of(rank, batch) for batch in range(BATCHES)]
    have_memory_at_hand(folder.parent / f"{folder.name}-{rank}", barrier)
    barrier.wait()
    for some in keys:
        store.write(some)
    store.close()
    barrier.wait()


def seconds_to_write(name: str, folder: Path) -> float:
    """Seconds a record, of both writers together."""
    context = worker_context()
    barrier = context.Barrier(WRITERS + 1)
    writers = [context.Process(target=write_share, args=(name, folder, rank, barrier)) for rank in range(WRITERS)]
    for writer in writers:
        writer.start()
    barrier.wait(60)
    barrier.wait(60)
    started = time.perf_counter()
    barrier.wait(300)
    seconds = time.perf_counter() - started
    for writer in writers:
        writer.join()
    os.sync()  # the next store must not wait for the pages of this one
    return seconds / RECORDS


def drop_from_memory(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def seconds_to_read(name: str, folder: Path, *, cold: bool) -> float:
    """Seconds a record: on the wall for a quarter of them from the disk, of the CPU for all of them from memory.

    A quarter: a cache is larger than memory, so what a store reads beyond a record must not count as read ahead.
    """
    if cold:
        drop_from_memory(folder)
    store, keys = a_store(name, folder), all_keys()
    order = np.random.Generator(np.random.Philox(3)).permutation(len(keys))[: len(keys) // 4 if cold else len(keys)]

    def read_all() -> None:
        for at in range(0, len(order), BATCH):
            levels = store.read([keys[n] for n in order[at : at + BATCH]])
        assert [level.shape for level in levels] == [(BATCH, *level) for level in LEVELS]

    if not cold:
        read_all()
    clock = time.perf_counter if cold else time.process_time
    started = clock()
    read_all()
    seconds = clock() - started
    store.close()
    return seconds / len(order)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stores() -> list[str]:
    return ["ours", "ours_int8", *(name for name, package in PEERS.items() if importlib.util.find_spec(package))]


def report(benchmark, capsys, title: str, seconds: dict[str, list[float]]) -> None:
    """Print and record MB/s of fp16 features, ms a record, and ratios to ours."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    size = SPEC.payload_bytes / 1e6
    rows = []
    for name, value in median.items():
        benchmark.extra_info[f"{name}_MB_per_s"] = round(size / value, 1)
        benchmark.extra_info[f"{name}_over_ours"] = round(value / median["ours"], 2)
        rows.append(f"{name} {value * 1e3:.3f} ms, {size / value:.0f} MB/s, {value / median['ours']:.2f}× ours'")
    with capsys.disabled():
        print(f"\n{title}, a record of {SPEC.payload_bytes / 1e3:.0f} kB (times relative to ours):")
        print("\n".join(f"  {row}" for row in rows))
        for name, package in PEERS.items():
            if name not in median:
                print(f"  {name} not measured: {package} is not installed")


@pytest.mark.skipif(len(stores()) == 2, reason="no peer: pip install lmdb diskcache")
def test_writes_of_two_processes_and_random_reads(benchmark, tmp_path, capsys):
    writes = {name: [] for name in stores()}
    warm, cold = ({name: [] for name in writes} for _ in range(2))
    for number in range(ROUNDS):
        names = list(writes)
        for name in names[number:] + names[:number]:  # none is always the first, after a round's clearing up
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            writes[name].append(seconds_to_write(name, folder))
            warm[name].append(seconds_to_read(name, folder, cold=False))
            cold[name].append(seconds_to_read(name, folder, cold=True))
            shutil.rmtree(folder)
            os.sync()
    for title, seconds in (("writes, 2 processes", writes), ("reads, warm (CPU)", warm), ("reads, cold", cold)):
        report(benchmark, capsys, title, seconds)
    with contextlib.closing(Ours(tmp_path / "row")) as store:
        for batch in range(BATCHES):
            store.write(keys_of(0, batch))
        store.writer.flush()
        benchmark.pedantic(store.read, args=(keys_of(0, 0),), rounds=50)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_quantise_a_batch(benchmark, dtype):
    features = [torch.randn(BATCH, *level) for level in LEVELS]
    benchmark.extra_info["MB"] = round(BATCH * sum(math.prod(level) for level in LEVELS) * 4 / 1e6, 1)
    benchmark(lambda: quantise(features, dtype))


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_dequantise_a_batch(benchmark, dtype):
    stored = a_batch(dtype)
    benchmark(lambda: dequantise(stored))


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_read_a_batch_from_memory(benchmark, tmp_path, dtype):
    with contextlib.closing(Ours(tmp_path, dtype=dtype)) as store:
        store.write(keys_of(0, 0))
        store.writer.flush()
        benchmark(lambda: store.read(keys_of(0, 0)))
