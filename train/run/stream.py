"""A run's training batches: phase after phase, from wherever the run stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from data.shards.set import ShardSet
from data.stream.loader import PairLoader, check_bad
from train.config.patches import in_phase, pairs_before, phases
from train.config.schema import Config
from train.config.sources import pair_loader
from train.engine.engine import Engine
from train.log import log


class TrainingStream:
    """The batches of a run on one rank, and the bad samples that it has met."""

    def __init__(self, config: Config, sets: Sequence[ShardSet], engine: Engine) -> None:
        self._config, self._sets, self._engine = config, sets, engine
        self._loaders: list[PairLoader] = []

    def batches(self, step: int, attach: Callable[[dict], None] | None) -> Iterator[dict]:
        """Batches from the 0-based `step` to the end. Each phase has a loader of its own: what is made ahead is never
        of another size. attach: see `pair_loader`."""
        config, engine = self._config, self._engine
        for phase in phases(config):
            if step >= phase.last:
                continue
            if len(phases(config)) > 1:
                log.info("step %d: %d pairs a step, crops of %d px", step, phase.batch, phase.crop)
                engine.forget_graphs()
            loader = pair_loader(
                in_phase(config, phase),
                self._sets,
                start=pairs_before(config, step),
                batches=phase.last - step,
                rank=engine.rank,
                world=engine.world,
                pin_memory=engine.device.type == "cuda",
                device=engine.device,
                attach=attach,
            )
            self._loaders.append(loader)
            yield from loader
            step = phase.last

    def check_bad(self) -> None:
        """DataError where all ranks together have met more bad samples than are allowed; every rank calls this."""
        allowed = self._config.data.max_bad_fraction
        if allowed and self._loaders:
            mine = set().union(*(loader.bad_samples for loader in self._loaders))
            check_bad(set().union(*self._engine.gather(mine)), self._sets, allowed)
