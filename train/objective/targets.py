"""The teacher's features of a batch: read from the node's cache where the loader found them, computed where not.

Computed features go through the stored form too: what a crop's target is does not depend on whether it
was a hit, so a run that is resumed beside its cache has the losses of one that was never stopped.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data.feature_cache.cache import FeatureCache
from data.feature_cache.codec import dequantise, quantise
from data.feature_cache.folders import default_root
from data.feature_cache.reader import Found, SwitchedAttach
from data.feature_cache.spec import CacheSpec, crop_keys
from data.files import own_folder
from train.config.schema import Config
from train.log import log

WARM_UP = 2  # calls of the teacher that are not timed
TIMED_CROPS = 48  # crops that are, before `auto` decides
PROBED = 64  # records that are read back for it

# Relative L2 distance of a level that the teacher's arithmetic explains, which depends on the size of the batch.
DRIFT = {"fp32": 0.01, "bf16": 0.05}


class CachedTargets:
    """t_l of training batches through a cache. `attach` is what the loader's workers call.

    teacher: frozen, with `channels`, `strides`, `precision` and `fingerprint()`. rank names this process's files;
    over_ranks sums numbers over the ranks.
    Counters: `hits`, `computed` (crops), `corrupt` (records met), `read_s`, `read_bytes`; `teacher_ms` a crop, None
    until measured; `share` of the last batch's crops that were read.
    Raises DataError for a cache folder that says it is another's.
    """

    def __init__(
        self,
        teacher: nn.Module,
        config: Config,
        device: torch.device,
        rank: int,
        over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self._over_ranks = over_ranks
        self.teacher, self.settings, self.device, self.rank = teacher, config.features, device, rank
        self.hits = self.computed = self.corrupt = self.drifted = 0
        self.read_s, self.read_bytes, self.share = 0.0, 0, 0.0
        self.teacher_ms: float | None = None
        self._timed: list[tuple[int, float]] = []
        self._keys: list[bytes] = []
        self._since_check = 0
        settings, spec = self.settings, cache_spec(teacher, config)
        limit = int(settings.limit_gib * 2**30)
        self.cache = FeatureCache(
            settings.folder or own_folder(default_root(), "features.folder"), spec, limit_bytes=limit
        )
        self.writer = self.cache.writer(f"rank{rank}")
        self.attach = SwitchedAttach(self.cache.reader())
        self.deciding = settings.cache == "auto"
        log.info("feature cache: %s, %s, %d bytes a crop", self.cache.folder, settings.dtype, spec.record_bytes)
        for name, differing in list(self.cache.others().items())[:3]:
            log.info("feature cache: %s beside it is of another %s and stays unused", name, ", ".join(differing))

    @property
    def active(self) -> bool:
        """Whether features are kept and read; no more once the cache was turned off."""
        return self.attach.on

    def __call__(
        self, sharp: Tensor, batch: Mapping[str, Any], autocast: contextlib.AbstractContextManager
    ) -> tuple[Tensor, ...]:
        """Level features [B, c_l, h_l, w_l] of sharp crops [B, 3, S, S] in [0, 1]; batch: what the loader said of them.

        A batch without `features` (nothing was looked up) is computed and not kept.
        """
        self.share = 0.0
        looked_up: Found | None = batch.get("features") if self.active else None
        if looked_up is None:
            self.computed += len(sharp)
            return self._compute(sharp, autocast)
        self._count_corrupt(looked_up.corrupt)
        hits = torch.zeros(len(sharp), dtype=torch.bool) if self.deciding else looked_up.hits
        missing = ~hits
        computed = self._computed_and_kept(sharp, batch, missing, autocast) if missing.any() else None
        if not hits.any():
            self._maybe_decide()
            return tuple(computed)
        found = [level.to(self.device, non_blocking=True).float() for level in looked_up.levels]
        self.hits += int(hits.sum())
        self.read_s += looked_up.seconds
        self.read_bytes += looked_up.bytes
        self.share = float(hits.float().mean())
        self._maybe_check(sharp, batch, hits, found, autocast)
        if computed is None:
            return tuple(found)
        levels = []
        for level, fresh in zip(found, computed, strict=True):
            whole = level.new_empty(len(sharp), *level.shape[1:])
            whole[hits.to(self.device)], whole[missing.to(self.device)] = level, fresh
            levels.append(whole)
        return tuple(levels)

    def _compute(self, sharp: Tensor, autocast: contextlib.AbstractContextManager) -> tuple[Tensor, ...]:
        with autocast:
            return self.teacher(sharp)

    def _computed_and_kept(self, sharp: Tensor, batch: Mapping[str, Any], missing: Tensor, autocast) -> list[Tensor]:
        """Features of the missing crops as a later hit will return them, on their way to the disk."""
        crops = sharp if missing.all() else sharp[missing.to(self.device)]
        with self._stopwatch(len(crops)):
            features = self._compute(crops, autocast)
        self.computed += len(crops)
        stored = quantise(features, self.settings.dtype)
        keys = [key for key, wanted in zip(crop_keys(batch), missing.tolist(), strict=True) if wanted]
        self.writer.put(keys, stored)
        if self.deciding:
            self._keys = (self._keys + keys)[-PROBED:]
        return dequantise(stored, features)

    @contextlib.contextmanager
    def _stopwatch(self, crops: int) -> Iterator[None]:
        """Time a call of the teacher, until enough of them are known."""
        if self.teacher_ms is not None:
            yield
            return
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self._timed.append((crops, time.perf_counter() - started))
        counted = self._timed[WARM_UP:]
        if sum(n for n, _ in counted) >= TIMED_CROPS:
            # The median call: one that something else delayed says nothing about the teacher.
            self.teacher_ms = sorted(seconds / n for n, seconds in counted)[len(counted) // 2] * 1e3

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _maybe_decide(self) -> None:
        if not self.deciding or self.teacher_ms is None:
            return
        self.deciding = False
        read_ms, rate = self.cache.probe(self._keys)
        # One decision for all: every rank comes here in the same step, as no crop is read before it.
        all_read_ms, all_teacher_ms = self._over_ranks(torch.tensor([read_ms, self.teacher_ms])).tolist()
        numbers = f"reading a crop takes {read_ms:.2f} ms ({rate:.0f} MB/s), computing it {self.teacher_ms:.2f} ms"
        if not math.isfinite(read_ms):
            numbers = f"nothing could be read back ({self.writer.stopped or 'the writes were dropped'})"
        if all_read_ms < all_teacher_ms:
            log.info("feature cache: kept: %s", numbers)
        else:
            self._turn_off()
            log.info("feature cache: turned off, it does not pay: %s", numbers)

    def _turn_off(self) -> None:
        self.attach.turn_off()
        self.writer.close()

    def _maybe_check(
        self, sharp: Tensor, batch: Mapping[str, Any], hits: Tensor, found: list[Tensor], autocast
    ) -> None:
        """Every `check_every` hits compute one again; a cache that says something else is not used any more.

        Both in the stored form: int8 is far from what was computed where one number towers above its channel.
        """
        every = self.settings.check_every
        self._since_check += int(hits.sum())
        if not every or self._since_check < every:
            return
        self._since_check = 0
        row = int(hits.nonzero()[0])
        fresh = self._compute(sharp[row : row + 1], autocast)
        fresh = dequantise(quantise(fresh, self.settings.dtype), fresh)
        distance = max(_distance(level[:1], again) for level, again in zip(found, fresh, strict=True))
        if not distance <= DRIFT[self.teacher.precision]:
            self.drifted += 1
            self._turn_off()
            log.warning(
                f"feature cache: turned off: what it has of {batch['key'][row]} differs by {100 * distance:.1f} % from "
                "what the teacher computes; clear it with `sharpprior cache clear`"
            )

    def _count_corrupt(self, count: int) -> None:
        if count and not self.corrupt:
            log.warning("feature cache: a damaged record in %s; such crops are computed again", self.cache.folder)
        self.corrupt += count

    def summary(self) -> str:
        """One line about what the cache did in this process."""
        seen = self.hits + self.computed
        line = f"{self.hits / max(seen, 1):.0%} of {seen} crops read"
        if self.hits and self.read_s:
            each = self.read_s / self.hits * 1e3
            line += f" at {self.read_bytes / self.read_s / 1e6:.0f} MB/s, {each:.2f} ms each"
            if self.teacher_ms is not None:
                saved = self.hits * (self.teacher_ms - each) / 1e3
                line += f" (computing one takes {self.teacher_ms:.2f} ms: {saved:.1f} s saved)"
        written = self.writer.stats
        line += f"; {written.written} written"
        for count, what in ((written.dropped, "not written"), (self.corrupt, "damaged")):
            if count:
                line += f", {count} {what}"
        return line if self.active else f"turned off; {line}"

    def retire(self) -> None:
        """Look nothing up and keep nothing from now on."""
        if self.active:
            self._turn_off()

    def close(self) -> None:
        """Write what waits, close the files."""
        if self.active:
            self.writer.close()


def cache_spec(teacher: nn.Module, config: Config) -> CacheSpec:
    """What the cache of a run with this teacher holds."""
    data = config.data
    return CacheSpec(
        teacher.fingerprint(),
        tuple(
            (channels, math.ceil(data.crop / stride), math.ceil(data.crop / stride))
            for channels, stride in zip(teacher.channels, teacher.strides, strict=True)
        ),
        {"size": data.crop, "boxes": data.boxes_per_photo, "margin": data.margin, "seed": config.run.seed},
        config.features.dtype,
    )


def _distance(found: Tensor, computed: Tensor) -> float:
    """Relative L2 distance; features that are all but zero count as equal."""
    return float((found - computed).norm() / (computed.norm() + 1e-6))
