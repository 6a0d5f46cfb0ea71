"""What happens at a step, as pure functions of it, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from train.config.schema import Config


def cosine_with_warmup(step: int, steps: int, warmup: int, final: float) -> float:
    """Factor of the peak learning rate for the 0-based `step` of `steps`: linear from 1/warmup to 1, then half a cosine
    to `final` at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    span = max(1, steps - 1 - warmup)
    progress = min(1.0, (step - warmup) / span)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rates(step: int, config: Config) -> tuple[float, float]:
    """(restorer, prior) learning rates of a step. The restorer rests while the student distills, then warms up too."""
    factor = cosine_with_warmup(step, config.train.steps, config.optim.warmup, config.optim.final_lr)
    lr = config.optim.lr * factor
    trained = step - config.train.distill_steps + 1  # steps of the restorer, this one counted
    ramp = (
        min(1.0, max(0, trained) / config.optim.warmup) if config.optim.warmup and config.train.distill_steps else 1.0
    )
    return (lr * ramp if trained > 0 else 0.0), lr * config.optim.prior_lr_scale


def cfl_weight(step: int, config: Config) -> float:
    """Weight λ of cross-level feature learning at the 0-based `step`: 1 while the student distills, then from loss.cfl
    to loss.cfl_final, which the last step has."""
    if step < config.train.distill_steps:
        return 1.0
    first, last = config.loss.cfl, config.loss.cfl_final
    if last is None:
        return first
    done = (step - config.train.distill_steps) / max(1, config.train.steps - 1 - config.train.distill_steps)
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
