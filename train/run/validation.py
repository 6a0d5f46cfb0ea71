"""A run's evaluations: the same pairs and yardsticks each time, shared by the ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data.blur import TIERS
from data.shards.set import ShardSet
from data.stream.validation import validation_count, validation_pairs
from train.config.patches import evaluated_at_once
from train.config.schema import Config
from train.engine.engine import Engine
from train.evaluate.held import HeldPairs
from train.evaluate.scores import VALIDATION_SEED, Evaluation, evaluate_pairs, merge, panel_numbers
from train.evaluate.training_pairs import training_digest, training_moments
from train.evaluate.yardsticks import Yardsticks, choose
from train.log import log
from train.objective.task import DeblurTask
from train.run.folder import RunFolder
from train.watch.heartbeat import beat


class Validation:
    """Scores the validation list; every rank makes one and calls it at the same places."""

    def __init__(
        self, config: Config, folder: RunFolder, engine: Engine, train_sets: Sequence[ShardSet], val_set: ShardSet
    ) -> None:
        self._config, self._folder, self._engine = config, folder, engine
        self._train_sets, self._val_set = train_sets, val_set
        self._yardsticks: Yardsticks | None = None
        self._share = math.ceil(validation_count(val_set, TIERS, config.eval.per_tier) / engine.world)
        self._pairs = HeldPairs(self._make_pairs, size=self._share * 2 * 3 * config.eval.crop**2)

    def scores(self, task: DeblurTask, on_forward: Callable[[], None]) -> Evaluation:
        """Scores of all ranks' pairs with the weights that are in place, on every rank."""
        engine, settings = self._engine, self._config.eval
        at_once = evaluated_at_once(self._config, engine.world, engine.device.type)
        if self._yardsticks is None:
            self._yardsticks = self._chosen_yardsticks()
        with engine.autocast():
            part = evaluate_pairs(
                engine.module,
                self._pairs,
                device=engine.device,
                yardsticks=self._yardsticks,
                teacher=task.teacher,
                similarity=task.similarity,
                keep=panel_numbers(settings.panels, self._val_set, settings.per_tier),
                at_once=at_once,
                forwards=math.ceil(self._share / at_once),
                dummy_size=settings.crop,
                on_forward=on_forward,
            )
        return merge(engine.gather(part))

    def _make_pairs(self) -> Iterator[dict]:
        return validation_pairs(
            self._val_set,
            self._config.blur,
            crop=self._config.eval.crop,
            crops=self._config.eval.per_tier,
            seed=VALIDATION_SEED,
            rank=self._engine.rank,
            world=self._engine.world,
            margin=self._config.data.margin,
        )

    def _chosen_yardsticks(self) -> Yardsticks:
        """The run's yardsticks: those in its folder, else chosen on training pairs, which gives the same ones."""
        engine, path = self._engine, self._folder.yardsticks
        digest = training_digest(self._config, self._train_sets)
        kept = engine.gather(_kept(path) if engine.main else None)[0]
        if kept is not None and kept.digest == digest:
            return kept
        started = time.perf_counter()
        beat("evaluate")
        with engine.agreed():
            mine = training_moments(self._config, self._train_sets, rank=engine.rank, world=engine.world)
        found = choose([each for part in engine.gather(mine) for each in part], digest)
        with engine.agreed():
            if engine.main:
                found.save(path)
                seconds = time.perf_counter() - started
                log.info("yardsticks: chosen on %d training pairs in %.1f s", found.pairs, seconds)
        return found


def _kept(path: Path) -> Yardsticks | None:
    try:
        return Yardsticks.load(path) if path.exists() else None
    except (OSError, ValueError) as error:
        log.warning("%s", error)
        return None
