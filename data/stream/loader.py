"""Run the training stream of one rank in worker processes, and the fixed validation list."""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch.utils.data import DataLoader

from data.blur import BlurConfig
from data.errors import DataError
from data.shards.set import ShardSet
from data.stream.crops import CropPlan, check_crop_fits
from data.stream.hung import answer_in, describe
from data.stream.order import Plan, Share
from data.stream.pairs import Sources, pair_pipeline, render_deferred
from data.workers import init_worker, main_not_imported_again, worker_context

LOOK_EVERY_S = 5.0  # after dead workers, while no batch comes
log = logging.getLogger("sharpprior.data")


class PairLoader:
    """The micro-batches of one rank, in order, made by `workers` processes (0: in this one).

    Each batch: blurry, sharp uint8 [B, 3, S, S]; key, image (content id), tier, generator lists; box [B, 3] (top, left,
    size px), crop (number of the box), flip, epoch, source, position, extent (px), input_psnr (dB) [B];
    samples_consumed: the state to save once the optimizer has used the batch. With `accumulation` a, a batches make a
    step. `sets` are shard sets (or paths); `max_bad_fraction` is the part of a set's samples that may be unreadable.
    `device` renders the blur there, batch by batch, instead of in the workers, which then only decode and draw; the
    pairs are the same up to rounding and blurry and sharp are on that device. `attach(batch)` runs in the worker. No
    batch for `stall_s` seconds is an error that says what every worker is doing.
    `loader.wait_s` and `loader.pairs` count the seconds spent waiting and the pairs delivered.

    Never pass it to `accelerator.prepare`: it is sharded already. Raises DataError for bad data, one line each.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet | str | Path] | ShardSet | str | Path,
        blur: BlurConfig,
        *,
        crop: int,
        global_batch: int,
        seed: int = 0,
        start: int = 0,
        batches: int | None = None,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        weights: Sequence[float] | None = None,
        window: int = 8,
        canonical_groups: int = 1,
        crops_per_decode: int = 1,
        boxes: int = 16,
        margin: int = 80,
        max_bad_fraction: float = 0.0,
        pin_memory: bool = False,
        device: torch.device | str | None = None,
        attach: Callable[[dict], None] | None = None,
        stall_s: float = 300.0,
    ) -> None:
        if not 0 <= max_bad_fraction < 1 or workers < 0 or start < 0 or prefetch < 1:
            raise DataError(
                f"max_bad_fraction {max_bad_fraction} (0 to below 1), workers {workers} and start {start} (0 or more), "
                f"prefetch {prefetch} (1 or more): out of range"
            )
        chosen = [sets] if isinstance(sets, (ShardSet, str, Path)) else list(sets)
        self.sets = [s if isinstance(s, ShardSet) else ShardSet(s, check=max_bad_fraction == 0) for s in chosen]
        for shards in self.sets:
            check_crop_fits(shards, crop)
        sizes = [[len(shard) for shard in shards.shards] for shards in self.sets]
        self.plan = Plan(
            sizes,
            seed,
            weights=weights,
            window=window,
            canonical_groups=canonical_groups,
            crops_per_decode=crops_per_decode,
        )
        self.share = Share(global_batch, rank, world, accumulation, canonical_groups)
        self.start, self.batches, self.workers, self.prefetch = start, batches, workers, prefetch
        self.stall_s, self.look_s = stall_s, min(LOOK_EVERY_S, stall_s)
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.wait_s, self.pairs = 0.0, 0
        self.bad: dict[str, set[str]] = {}
        self.max_bad_fraction, self.device = max_bad_fraction, device
        self._bad_samples: set[tuple[int, int]] = set()
        self.pipeline = pair_pipeline(
            Sources(self.sets, max_bad_fraction),
            blur,
            self.plan,
            CropPlan(crop, seed, boxes, margin),
            self.share,
            start=start,
            batches=batches,
            defer=device is not None,
            attach=attach,
        )

    def __iter__(self) -> Iterator[dict]:
        """Iterate from `start`; leaving the loop early, by an error or Ctrl-C too, stops the workers."""
        iterator, stop = self._open()
        number = 0
        try:
            while True:
                waited = time.perf_counter()
                batch = self._next(iterator)
                self.wait_s += time.perf_counter() - waited
                if batch is None:
                    return
                if "failure" in batch:
                    raise DataError(batch["failure"])
                number += 1
                yield self._finish(batch, number)
        finally:
            stop()

    def _next(self, iterator: Iterator[dict]) -> dict | None:
        """The next batch, None at the end; DataError where none comes."""
        looks = 0
        while True:
            try:
                return next(iterator, None)
            except RuntimeError as error:
                if "DataLoader timed out" in str(error):
                    looks += 1  # not a clock: time in which this process itself stood still does not count
                    if looks * self.look_s < self.stall_s:
                        continue
                    self._give_up(iterator)
                if "DataLoader worker" not in str(error):
                    raise
                raise DataError(f"a loader worker died (out of memory?): {error}; lower data.workers") from None

    def _give_up(self, iterator: Iterator[dict]) -> NoReturn:
        doing = describe(Path(self._folder), [worker.pid for worker in iterator._workers])
        for worker in iterator._workers:
            worker.kill()  # what hangs does not listen to less, and is waited for at the end
        raise DataError(
            f"no batch came for {self.stall_s:.0f} s: {doing}; check the storage and the machine's memory, or raise "
            "data.stall_minutes"
        )

    def _open(self) -> tuple[Iterator[dict], Callable[[], None]]:
        if self.workers == 0:
            return iter(self.pipeline), lambda: None
        self._folder = tempfile.mkdtemp(prefix="sharpprior-loader-")
        loader = DataLoader(
            self.pipeline,
            batch_size=None,
            collate_fn=as_is,
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
            multiprocessing_context=worker_context(),
            worker_init_fn=partial(_init_loader_worker, Path(self._folder)),
            pin_memory=self.pin_memory,
            timeout=self.look_s,
        )
        with main_not_imported_again():
            iterator = iter(loader)

        def stop() -> None:
            iterator._shutdown_workers()
            shutil.rmtree(self._folder, ignore_errors=True)

        return iterator, stop

    def _finish(self, batch: dict, number: int) -> dict:
        for source, sample, message in batch.pop("bad"):
            self._count_bad(source, sample, message)
        if "deferred" in batch:
            batch = render_deferred(batch, self.device)
        for name in ("box", "crop", "flip", "epoch", "source", "position", "extent", "input_psnr"):
            batch[name] = torch.from_numpy(batch[name])
        steps = number // self.share.accumulation
        batch["samples_consumed"] = self.start + steps * self.share.global_batch
        self.pairs += len(batch["key"])
        return batch

    def _count_bad(self, source: int, sample: int, message: str) -> None:
        if (source, sample) in self._bad_samples:
            return
        self._bad_samples.add((source, sample))
        shards = self.sets[source]
        shard, row = shards.locate(sample)
        name = f"{shards.location}/{shards.shards[shard].name}"
        self.bad.setdefault(name, set()).add(shards.shards[shard].keys[row])
        log.warning("bad sample replaced: %s", message)
        # Of the whole set: a rank that has met one bad sample early knows nothing of its share.
        found = sum(1 for where, _ in self._bad_samples if where == source)
        if found > self.max_bad_fraction * len(shards):
            counts = ", ".join(f"{shard}: {len(keys)}" for shard, keys in self.bad.items())
            raise DataError(
                f"{found} bad samples exceed max_bad_fraction {self.max_bad_fraction} of {shards.location} ({counts}); "
                f"the last: {message}"
            )


def _init_loader_worker(folder: Path, _: int) -> None:
    init_worker()
    answer_in(folder)


def as_is(batch: dict) -> dict:
    """The batch itself: torch's default would turn every array into shared memory of its own."""
    return batch
