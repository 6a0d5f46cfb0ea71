"""Run the training stream of one rank in worker processes."""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import webdataset as wds
from torch.utils.data import DataLoader

from data.blur import BlurConfig
from data.errors import DataError
from data.shards.set import ShardSet
from data.stream.batch import Batch, Made, finish
from data.stream.config import StreamConfig
from data.stream.crops import CropPlan, check_crop_fits, margin_of
from data.stream.hung import answer_in, describe
from data.stream.order import Plan, Share
from data.stream.pairs import MakeBatches, Sources, planned_slots
from data.workers import init_worker, main_not_imported_again, worker_context

LOOK_EVERY_S = 5.0  # after dead workers, while no batch comes
PREFETCH = 2  # batches that each worker is ahead
log = logging.getLogger("sharpprior.data")


class PairLoader:
    """The micro-batches (`Batch`) of one rank, in order, made by `stream.workers` processes (0: in this one).

    global_batch: pairs of a step over all ranks; with `accumulation` a, a batches of this rank make its part. start:
    samples consumed before; batches: global batches until the end (None: endless). weights: shares of the sets, None:
    equal. device: render the blur there, batch by batch, instead of in the workers, which then only decode and draw;
    the pairs are the same up to rounding. attach: called with each batch in the worker, may add `features` to it.
    No batch for `stream.stall_minutes` is an error that says what every worker is doing.
    `wait_s` and `pairs` count the seconds spent waiting and the pairs delivered; `bad` names the samples replaced.

    Never pass it to `accelerator.prepare`: it is sharded already. Raises DataError for bad data, one line each.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        blur: BlurConfig,
        stream: StreamConfig,
        *,
        global_batch: int,
        seed: int = 0,
        start: int = 0,
        batches: int | None = None,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        weights: Sequence[float] | None = None,
        pin_memory: bool = False,
        device: torch.device | str | None = None,
        attach: Callable[[dict], None] | None = None,
    ) -> None:
        assert start >= 0, start
        self.sets, self.stream, self.start, self.device = list(sets), stream, start, device
        for shards in self.sets:
            check_crop_fits(shards, stream.crop)
        self.plan = Plan([[len(shard) for shard in shards.shards] for shards in self.sets], seed, stream, weights)
        self.share = Share(global_batch, rank, world, accumulation, stream.canonical_groups)
        self.stall_s = 60 * stream.stall_minutes
        self.look_s = min(LOOK_EVERY_S, self.stall_s)
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.wait_s, self.pairs = 0.0, 0
        self._waiting: int | None = None  # number of the batch that is waited for now
        self._doing: str | None = None  # what workers did that the guard has ended
        self.bad: dict[str, set[str]] = {}
        self.bad_samples: set[tuple[int, int]] = set()
        sources = Sources(self.sets, stream.max_bad_fraction)
        crops = [
            CropPlan(stream.crop, seed, stream.boxes_per_photo, margin_of(shards, blur, stream.margin))
            for shards in self.sets
        ]
        self.pipeline = wds.DataPipeline(
            partial(planned_slots, self.plan, self.share, start, batches),
            MakeBatches(sources, self.plan, crops, blur, defer=device is not None, attach=attach),
        )

    def __iter__(self) -> Iterator[Batch]:
        """Iterate from `start`; leaving the loop early, by an error or Ctrl-C too, stops the workers."""
        iterator, stop = self._open()
        number = 0
        try:
            while True:
                waited = time.perf_counter()
                self._waiting = number
                made = self._next(iterator)
                self._waiting = None
                self.wait_s += time.perf_counter() - waited
                if made is None:
                    return
                if made.failure is not None:
                    raise DataError(made.failure)
                for source, sample, message in made.bad:
                    self._count_bad(source, sample, message)
                number += 1
                steps = number // self.share.accumulation
                batch = finish(made, self.device, self.start + steps * self.share.global_batch)
                self.pairs += len(batch["key"])
                yield batch
        finally:
            stop()

    def _next(self, iterator: Iterator[Made]) -> Made | None:
        """What comes next, None at the end; DataError where nothing comes."""
        looks = 0
        while True:
            try:
                return next(iterator, None)
            except Exception as error:  # of several types where a worker ends while it hands a batch over
                if self._doing is not None:
                    self._stalled(self._doing)
                if not isinstance(error, RuntimeError):
                    raise
                if "DataLoader timed out" in str(error):
                    looks += 1  # not a clock: time in which this process itself stood still does not count
                    if looks * self.look_s < self.stall_s:
                        continue
                    self._give_up(iterator)
                if "DataLoader worker" not in str(error):
                    raise
                raise DataError(f"a loader worker died (out of memory?): {error}; lower data.workers") from None

    def _give_up(self, iterator: Iterator[Made]) -> NoReturn:
        doing = describe(Path(self._folder), [worker.pid for worker in iterator._workers])
        for worker in iterator._workers:
            worker.kill()  # what hangs does not listen to less, and is waited for at the end
        self._stalled(doing)

    def _guard(self, iterator: Iterator[Made], ended: threading.Event) -> None:
        """End workers whose batch is waited for where no timeout is: one may stop just when its batch was announced and
        its memory is still to be handed over. Two looks later than `_next`, which is the rule."""
        seen, looks = None, 0
        while not ended.wait(self.look_s):
            waiting = self._waiting
            looks = looks + 1 if waiting is not None and waiting == seen else 0
            seen = waiting
            if (looks - 2) * self.look_s > self.stall_s:
                self._doing = describe(Path(self._folder), [worker.pid for worker in iterator._workers])
                for worker in iterator._workers:
                    worker.kill()
                return

    def _stalled(self, doing: str) -> NoReturn:
        raise DataError(
            f"no batch came for {self.stall_s:.0f} s: {doing}; check the storage and the machine's memory, or raise "
            "data.stall_minutes"
        )

    def _open(self) -> tuple[Iterator[Made], Callable[[], None]]:
        if self.stream.workers == 0:
            return iter(self.pipeline), lambda: None
        self._folder, held = make_folder()
        loader = DataLoader(
            self.pipeline,
            batch_size=None,
            collate_fn=as_is,
            num_workers=self.stream.workers,
            prefetch_factor=PREFETCH,
            multiprocessing_context=worker_context(),
            worker_init_fn=partial(_init_loader_worker, Path(self._folder)),
            pin_memory=self.pin_memory,
            timeout=self.look_s,
            generator=torch.Generator(),  # else it draws from the run's random numbers, once a start
        )
        with main_not_imported_again():
            iterator = iter(loader)
        ended = threading.Event()
        threading.Thread(target=self._guard, args=(iterator, ended), name="loader-guard", daemon=True).start()

        def stop() -> None:
            ended.set()
            iterator._shutdown_workers()
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(held)

        return iterator, stop

    def _count_bad(self, source: int, sample: int, message: str) -> None:
        if (source, sample) in self.bad_samples:
            return
        self.bad_samples.add((source, sample))
        shards = self.sets[source]
        name = f"{shards.location}/{shards.shards[shards.locate(sample)[0]].name}"
        self.bad.setdefault(name, set()).add(shards.key(sample))
        log.warning("bad sample replaced: %s", message)
        check_bad(self.bad_samples, self.sets, self.stream.max_bad_fraction, f"the last: {message}")


_PREFIX = "sharpprior-loader-"


def make_folder() -> tuple[str, int]:
    """A folder for what workers say when they hang, and a descriptor that holds it while this process lives. Folders of
    processes that were killed are removed: nobody holds them."""
    for old in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or gone already
            if old.stat().st_uid == os.geteuid() and time.time() - old.stat().st_mtime > 60:  # it may just begin
                descriptor = os.open(old, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(old, ignore_errors=True)
                finally:
                    os.close(descriptor)
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    held = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(held, fcntl.LOCK_EX)
    return folder, held


def check_bad(
    bad: Collection[tuple[int, int]], sets: Sequence[ShardSet], allowed: float, last: str = "found by all ranks"
) -> None:
    """DataError where the (source, sample) found bad are more than the allowed part of a set. Of the whole set: who has
    met one early knows nothing of its share."""
    for source, shards in enumerate(sets):
        found = [sample for where, sample in bad if where == source]
        if len(found) > allowed * len(shards):
            where = Counter(shards.shards[shards.locate(sample)[0]].name for sample in found)
            counts = ", ".join(f"{shards.location}/{name}: {count}" for name, count in sorted(where.items()))
            raise DataError(
                f"{len(found)} bad samples exceed max_bad_fraction {allowed} of {shards.location} ({counts}); {last}"
            )


def _init_loader_worker(folder: Path, _: int) -> None:
    init_worker()
    answer_in(folder)


def as_is(made: Made) -> Made:
    """The same: torch's default would turn every array into shared memory of its own."""
    return made
