"""What happens at a step, as pure functions of it, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from typing import NamedTuple

from train.config.schema import Config


def cosine_with_warmup(step: int, steps: int, warmup: int, final: float, hold: int = 0) -> float:
    """Factor of the peak learning rate for the 0-based `step` of `steps`: linear from 1/warmup to 1, `hold` steps at
    1, then half a cosine to `final` at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    span = max(1, steps - 1 - warmup - hold)
    progress = min(1.0, max(0, step - warmup - hold) / span)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def stage(step: int, config: Config) -> str:
    """Who learns at the 0-based `step`: `distill`, the prior alone; `spe`, the embeddings alone; `deblur`, all but a
    prior that rests by then (`Config.student_rests`)."""
    if step < config.train.distill_steps:
        return "distill"
    return "spe" if step < joint_from(config) else "deblur"


def joint_from(config: Config) -> int:
    """The first step of stage `deblur`, 0-based."""
    return config.train.distill_steps + config.train.spe_steps


def prior_learns(step: int, config: Config) -> bool:
    """Whether the prior network learns at the 0-based `step`."""
    now = stage(step, config)
    return config.model.prior and (now == "distill" or (now == "deblur" and not config.student_rests))


class Rates(NamedTuple):
    """Learning rates of a step's four parts."""

    restorer: float
    prior: float
    spe: float
    gate: float


def learning_rates(step: int, config: Config) -> Rates:
    """Learning rates of the 0-based `step`. Who rests has 0, and who begins later than the run then warms up too."""
    optim = config.optim
    factor = cosine_with_warmup(step, config.train.steps, optim.warmup, optim.final_lr, optim.hold)
    if optim.halve_every is not None:
        factor = min(1.0, (step + 1) / max(1, optim.warmup)) * 0.5 ** (step // optim.halve_every)
    lr = optim.lr * factor

    def risen(first: int) -> float:
        """The rate of what learns from step `first` on."""
        ramp = min(1.0, (step - first + 1) / optim.warmup) if optim.warmup and first else 1.0
        return lr * ramp if step >= first else 0.0

    prior = 0.0
    if prior_learns(step, config):  # in stage spe it rested, too
        prior = risen(joint_from(config) if config.train.spe_steps and stage(step, config) == "deblur" else 0)
    return Rates(
        risen(joint_from(config)) * optim.backbone_lr_scale,
        prior * optim.prior_lr_scale,
        risen(config.train.distill_steps) * optim.spe_lr_scale,
        risen(joint_from(config)) * optim.gate_lr_scale,
    )


def cfl_weight(step: int, config: Config) -> float:
    """Weight λ of cross-level feature learning at the 0-based `step`: 1 while the student distills, 0 while it rests,
    else from loss.cfl to loss.cfl_final, which the last step has."""
    if stage(step, config) == "distill":
        return 1.0
    if not prior_learns(step, config):
        return 0.0
    first, last = config.loss.cfl, config.loss.cfl_final
    if last is None:
        return first
    done = (step - joint_from(config)) / max(1, config.train.steps - 1 - joint_from(config))
    done = min(1.0, done)
    share = done if config.loss.cfl_schedule == "linear" else 0.5 * (1 - math.cos(math.pi * done))
    return first + (last - first) * share


def evaluation_due(step: int, config: Config) -> bool:
    """Whether an evaluation belongs to where a run stands with `step` steps done."""
    if not config.eval.enabled:
        return False
    if step == 0:
        return config.eval.at_start
    return step == config.train.steps or bool(config.eval.every and step % config.eval.every == 0)


def logged(step: int, config: Config) -> bool:
    """Whether a step is written down."""
    return step % config.train.log_every == 0 or step == config.train.steps
