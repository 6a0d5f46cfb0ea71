"""What changes hands between the stages of a run: whose updates begin, who rests, on which weights."""

from __future__ import annotations

from train.engine.average import Ema
from train.engine.engine import Engine
from train.engine.pieces import forget_gradients, forget_updates
from train.engine.precision import SIXTEEN_BIT_PARAMETERS
from train.engine.settings import part_of
from train.objective.task import DeblurTask
from train.run.schedule import joint_from, prior_learns, stage


def enter_stage(step: int, engine: Engine, task: DeblurTask, ema: Ema) -> str:
    """Make the run as its stage at the 0-based `step` wants it, before that step, and return the stage. Every rank
    calls this.

    A prior that comes to rest does so on its averaged weights, those that were evaluated and that another run would
    take over; from then on its average stays what it is, bit for bit.
    """
    config = engine.config
    forget_gradients(engine)
    if step == config.train.distill_steps > 0:  # all but the prior has waited: its updates begin now
        forget_updates(engine, lambda name: part_of(name) != "prior")
        if config.student_rests:
            ema.settle(lambda name: part_of(name) == "prior")
            # Moments that fade without gradients would pass through denormal numbers, on which a CPU is slow.
            forget_updates(engine, lambda name: part_of(name) == "prior")
    if step == joint_from(config) and config.train.spe_steps and prior_learns(step, config):
        forget_updates(engine, lambda name: part_of(name) == "prior")  # it rested while the embeddings learned
    return arrange(step, engine, task)


def arrange(step: int, engine: Engine, task: DeblurTask) -> str:
    """Let those rest who rest at the 0-based `step`, as in a process that goes on after it; returns its stage."""
    config, prior = engine.config, engine.module.prior
    if engine.graphs is not None:
        engine.graphs.forget()  # they hold who learned when they were captured
    if prior is not None:
        learns = prior_learns(step, config)
        prior.rest(not learns)
        if config.student_rests and not learns:
            task.close_targets()
            # Under ZeRO 3 no rank has whole weights; norms of 16-bit parameters are computed in another type.
            if config.engine.zero < 3 and config.engine.precision not in SIXTEEN_BIT_PARAMETERS:
                prior.student.fold()
    return stage(step, config)
