"""Before the first step: are the kernels right on this GPU, for what this run will call?"""

from __future__ import annotations

import time

from kernels import check, routes
from kernels.runtime import INTERPRETING
from train.config.schema import Config
from train.engine.engine import Engine
from train.engine.ranks import RankFacts
from train.log import log
from train.plan.kernels import kernel_cases
from train.watch.heartbeat import beat


def guard_kernels(config: Config, engine: Engine) -> None:
    """Have the first rank of each node check the kernels on its GPU, and every rank take the routes found right.

    Nothing on a CPU (but in Triton's interpreter), without a prior, or with `kernels.check` false. ValueError on every
    rank where nothing is right, or `kernels.strict` forbids a replacement. All ranks call this.
    """
    if not config.kernels.check or not config.model.prior:
        return
    if engine.device.type != "cuda" and not INTERPRETING:
        return
    mine = _kind(engine.ranks[engine.rank])
    first = next(facts.rank for facts in engine.ranks if _kind(facts) == mine)
    found: dict[routes.Case, str] | None = None
    with engine.agreed():
        if engine.rank == first:
            found = _checked(config, engine)
    told = engine.gather((mine, found))
    routes.use(next(each for kind, each in told if kind == mine and each is not None))


def _kind(facts: RankFacts) -> tuple[str, str]:
    """Host and name of the GPU: the ranks that share a finding."""
    return facts.host, facts.device.partition(" ")[2]


def _checked(config: Config, engine: Engine) -> dict[routes.Case, str]:
    started = time.monotonic()
    cases = kernel_cases(config, engine.world, engine.device.type)
    options = {"strict": config.kernels.strict, "tell": log.warning, "alive": lambda: beat("start")}
    replayed = config.engine.graphs != "off" and config.engine.no_graphs is None
    decisions = check.check(cases, engine.device, search=False, replayed=replayed, **options)
    right, took = sum(not each.wrong for each in decisions), time.monotonic() - started
    log.info("kernels: %d cases, %d of %d groups right as they are, %.1f s", len(cases), right, len(decisions), took)
    return check.choices(decisions)
