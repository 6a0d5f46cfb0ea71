"""Microbenchmarks of the stream: planned reads against stock webdataset and a plain Dataset of files.

All three deliver the same decoded RGB photographs from the page cache in one process; ratios are of medians of
interleaved rounds.
"""

import io
import itertools
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from torch.utils.data import Dataset

from data.blur import BlurConfig
from data.shards.set import ShardSet
from data.shards.write import ShardWriter
from data.stream.config import StreamConfig
from data.stream.loader import PairLoader
from data.stream.order import Plan
from data.stream.pairs import Sources

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
PHOTOGRAPHS = 200


class Files(Dataset):
    """A plain Dataset of image files, as torchvision's ImageFolder reads them."""

    def __init__(self, root: Path) -> None:
        self.paths = sorted(root.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> np.ndarray:
        with open(self.paths[number], "rb") as file:
            return np.asarray(Image.open(file).convert("RGB"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The bundled photographs, repeated to 200, as a shard set and as files; with their bytes in all."""
    root = tmp_path_factory.mktemp("stream")
    shards = ShardSet(SAMPLES / "train")
    total = 0
    (root / "files").mkdir()
    with ShardWriter(root / "set", shard_bytes=8 << 20) as writer:
        for number in range(PHOTOGRAPHS):
            data = shards.read(number % len(shards), "jpg")
            writer.add(f"k{number:04d}", {"jpg": data})
            (root / "files" / f"k{number:04d}.jpg").write_bytes(data)
            total += len(data)
    return root, total


def ours(root: Path) -> int:
    shards = ShardSet(root / "set")
    sources, plan = Sources([shards]), Plan([[len(shard) for shard in shards.shards]], 0, StreamConfig())
    return sum(sources.photograph(0, plan.slot(p).sample)[0].shape[0] > 0 for p in range(PHOTOGRAPHS))


def stock(root: Path) -> int:
    urls = [str(path) for path in sorted((root / "set").glob("*.tar"))]
    dataset = wds.WebDataset(urls, shardshuffle=100).shuffle(100).to_tuple("jpg")
    return sum(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).shape[0] > 0 for (data,) in dataset)


def files(root: Path) -> int:
    dataset = Files(root / "files")
    return sum(dataset[int(i)].shape[0] > 0 for i in np.random.default_rng(0).permutation(len(dataset)))


def seconds(read, root: Path) -> float:
    start = time.perf_counter()
    assert read(root) == PHOTOGRAPHS
    return time.perf_counter() - start


def test_decoded_photographs_per_second(benchmark, stored, capsys):
    root, total = stored
    times = {read.__name__: [] for read in (ours, stock, files)}
    for _, read in itertools.product(range(3), (ours, stock, files)):
        times[read.__name__].append(seconds(read, root))
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, value in median.items():
        benchmark.extra_info[f"{name}_MB_per_s"] = round(total / value / 1e6, 1)
    with capsys.disabled():
        speeds = ", ".join(f"{name} {total / value / 1e6:.1f} MB/s" for name, value in median.items())
        print(f"\nread + decode, 512² JPEG: {speeds}; ours / stock {median['stock'] / median['ours']:.2f}, ", end="")
        print(f"ours / files {median['files'] / median['ours']:.2f}")
    benchmark.pedantic(ours, args=(root,), rounds=2)


def test_bytes_per_second_without_decoding(benchmark, stored, capsys):
    root, total = stored

    def planned(root: Path) -> int:
        shards = ShardSet(root / "set")
        plan = Plan([[len(shard) for shard in shards.shards]], 0, StreamConfig())
        return sum(bool(shards.read(plan.slot(p).sample, "jpg")) for p in range(PHOTOGRAPHS))

    def plain(root: Path) -> int:
        urls = [str(path) for path in sorted((root / "set").glob("*.tar"))]
        return sum(bool(data) for (data,) in wds.WebDataset(urls, shardshuffle=100).shuffle(100).to_tuple("jpg"))

    times = {read.__name__: [] for read in (planned, plain)}
    for _, read in itertools.product(range(5), (planned, plain)):
        times[read.__name__].append(seconds(read, root))
    ratio = statistics.median(times["plain"]) / statistics.median(times["planned"])
    benchmark.extra_info["ours_over_stock"] = round(ratio, 2)
    with capsys.disabled():
        speeds = ", ".join(
            f"{name} {total / statistics.median(values) / 1e6:.0f} MB/s" for name, values in times.items()
        )
        print(f"\nbytes with checksum, warm: {speeds}; ours / stock {ratio:.2f}")
    benchmark.pedantic(planned, args=(root,), rounds=3)


@pytest.mark.parametrize("crops_per_decode", [1, 4])
def test_pairs_per_second_of_the_default_mix(benchmark, capsys, crops_per_decode):
    def stream() -> float:
        stream = StreamConfig(crop=256, crops_per_decode=crops_per_decode, workers=0)
        loader = PairLoader([ShardSet(SAMPLES / "train")], BlurConfig(), stream, global_batch=8, batches=8)
        for _ in loader:
            pass
        return loader.pairs / loader.wait_s

    stream()
    rate = benchmark.pedantic(stream, rounds=3)
    benchmark.extra_info["pairs_per_s"] = round(rate, 1)
    with capsys.disabled():
        print(
            f"\ndefault mix, 256², decode included, {crops_per_decode} crops a decode: {rate:.0f} pairs/s, one process"
        )
