"""What a set gives in training: severities, input PSNR per tier, sizes; drawn through the training stream."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data.blur import TIERS, BlurConfig
from data.errors import DataError
from data.files import write_atomically
from data.image import encode_png
from data.shards.set import ShardSet
from data.stream.config import StreamConfig
from data.stream.loader import PairLoader
from data.stream.pairs import PAIRED

EXTENT_EDGES = (0, 5, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 100, 120, 140, 160)


@dataclass(frozen=True)
class TierStats:
    """One tier: pairs drawn, their share; 5th, 50th and 95th percentile of input PSNR (dB) and extent (px)."""

    tier: str
    count: int
    share: float
    psnr: tuple[float, float, float]
    extent: tuple[float, float, float]


@dataclass(frozen=True)
class SetStats:
    """A set and the pairs drawn from it."""

    location: str
    kind: str
    samples: int
    shards: int
    bytes: int
    smallest: tuple[int, int]
    largest: tuple[int, int]
    tiers: tuple[TierStats, ...]
    generators: dict[str, int]
    histogram: tuple[int, ...]
    pairs: int

    def lines(self) -> list[str]:
        """The statistics as lines of plain text."""
        result = [
            f"{self.location}: {self.kind}, {self.samples} samples in {self.shards} shards, {self.bytes / 1e6:.1f} MB",
            f"sizes {self.smallest[0]}×{self.smallest[1]} to {self.largest[0]}×{self.largest[1]} px (by area)",
            f"{self.pairs} pairs drawn; input PSNR and extent as 5th, 50th, 95th percentile",
            f"{'tier':<10}{'pairs':>7}{'share':>8}{'PSNR dB':>24}{'extent px':>24}",
        ]
        for tier in self.tiers:
            psnr, extent = (" ".join(f"{value:7.1f}" for value in values) for values in (tier.psnr, tier.extent))
            result.append(f"{tier.tier:<10}{tier.count:>7}{tier.share:>8.1%}{psnr:>24}{extent:>24}")
        names = sorted(self.generators.items(), key=lambda item: -item[1])
        result.append("generators: " + ", ".join(f"{name} {count / self.pairs:.0%}" for name, count in names))
        top = max(self.histogram) or 1
        for low, high, count in zip(EXTENT_EDGES, EXTENT_EDGES[1:], self.histogram, strict=False):
            if self.kind != "pairs":
                result.append(f"{low:>4}–{high:<4}px {count:>6} {'█' * round(40 * count / top)}")
        return result


def set_stats(shards: ShardSet, blur: BlurConfig, stream: StreamConfig, *, pairs: int, seed: int = 0) -> SetStats:
    """Draw `pairs` training pairs of a set and describe them; raises DataError as the stream does."""
    if pairs < 1:
        raise DataError(f"pairs {pairs}: draw at least one")
    batch = min(pairs, 8)
    loader = PairLoader([shards], blur, stream, global_batch=batch, batches=-(-pairs // batch), seed=seed)
    drawn: dict[str, list] = {"tier": [], "generator": [], "extent": [], "input_psnr": []}
    for one in loader:
        for name, values in drawn.items():
            values.extend(one[name] if isinstance(one[name], list) else one[name].tolist())
    tier = np.array(drawn["tier"][:pairs])
    generators = drawn["generator"][:pairs]
    extent, psnr = (np.array(drawn[name][:pairs], np.float64) for name in ("extent", "input_psnr"))
    sizes = [(int(h), int(w)) for shard in shards.shards for h, w in zip(shard.heights, shard.widths, strict=True)]
    sizes.sort(key=lambda size: size[0] * size[1])
    known = extent[np.isfinite(extent)]
    return SetStats(
        location=shards.location,
        kind=shards.kind,
        samples=len(shards),
        shards=len(shards.shards),
        bytes=sum(shard.bytes for shard in shards.shards),
        smallest=sizes[0],
        largest=sizes[-1],
        tiers=tuple(_tier(name, tier == name, psnr, extent) for name in (*TIERS, PAIRED) if (tier == name).any()),
        generators={name: generators.count(name) for name in sorted(set(generators))},
        histogram=tuple(int(n) for n in np.histogram(np.minimum(known, EXTENT_EDGES[-1]), EXTENT_EDGES)[0]),
        pairs=len(tier),
    )


def _tier(name: str, chosen: np.ndarray, psnr: np.ndarray, extent: np.ndarray) -> TierStats:
    def spread(values: np.ndarray) -> tuple[float, float, float]:
        return tuple(float(value) for value in np.percentile(values, [5, 50, 95]))

    return TierStats(name, int(chosen.sum()), float(chosen.mean()), spread(psnr[chosen]), spread(extent[chosen]))


def draw_histogram(stats: SetStats, width: int = 720, height: int = 320) -> np.ndarray:
    """Histogram of extents, uint8 [height, width, 3]: one bar a bin of EXTENT_EDGES, count above, edge below."""
    picture = np.full((height, width, 3), 255, np.uint8)
    slot, top = (width - 20) // len(stats.histogram), max(stats.histogram) or 1
    for i, count in enumerate(stats.histogram):
        left, bar = 10 + i * slot, round((height - 60) * count / top)
        cv2.rectangle(picture, (left + 2, height - 30 - bar), (left + slot - 2, height - 30), (60, 110, 190), -1)
        for text, y in ((str(count), height - 34 - bar), (str(EXTENT_EDGES[i]), height - 12)):
            cv2.putText(picture, text, (left + 2, y), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    cv2.putText(picture, "extent, px", (width - 90, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return picture


def write_histogram(path: str | Path, stats: SetStats) -> Path:
    """Write `draw_histogram` as PNG; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, encode_png(draw_histogram(stats)))
    return path
