"""One optimizer step, asked of every rank at once: is the loss finite, did somebody ask to stop, what was the mean."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from train.engine.engine import Engine
from train.objective.task import DeblurTask
from train.run.schedule import cfl_weight, learning_rates, logged
from train.watch.heartbeat import PROGRESS, beat
from train.watch.signals import REASONS, StopRequest
from train.watch.traces import Traces

# What identifies the pairs of a batch.
BATCH_FACTS = ("key", "box", "flip", "epoch", "source", "position", "tier", "extent")


class WeightsNotFiniteError(ValueError):
    """The weights hold NaN or infinity: nothing that follows could mean anything."""


@dataclass
class StepResult:
    """What a step did: mean loss and parts over ranks and micro-batches, learning rates, seconds.

    cpu_s: processor time of this process (what a step costs on a machine that others use too).
    grad_norm: None where the step is not written down: reading it waits for the GPU. finite: whether loss and gradients
    of all ranks were. not_finite: what was not, here: `gradients`, or parts of this
    rank's loss. batches: `BATCH_FACTS` of this rank's.
    """

    loss: float
    parts: dict[str, float]
    lr: float
    grad_norm: float | None
    finite: bool
    wait_s: float
    total_s: float
    cpu_s: float = 0.0
    not_finite: list[str] = field(default_factory=list)
    batches: list[dict] = field(default_factory=list)
    overflowed: bool = False
    loss_scale: float | None = None

    @property
    def updated(self) -> bool:
        """Whether the weights moved."""
        return self.finite and not self.overflowed


def micro_batches(
    loader: Iterator[dict], count: int, timed: Callable[[str], AbstractContextManager] = nullcontext
) -> Iterator[tuple[dict, float]]:
    """The next `count` micro-batches, each with the seconds this process waited for it; timed: around the waits."""
    for _ in range(count):
        beat("data")
        asked = time.perf_counter()
        with timed("data"):
            batch = next(loader)
        yield batch, time.perf_counter() - asked


def training_step(
    engine: Engine, task: DeblurTask, loader: Iterator[dict], step: int, stop: StopRequest, traces: Traces
) -> StepResult:
    """Run the 0-based `step`: accumulate, clip, update. A micro-batch whose loss is not finite on any rank gives no
    gradient, and its step no update, as a step whose gradients are not; the result says so, and the caller counts.

    On a GPU this process waits for it once a micro-batch, where all ranks' verdict on the losses is read, before the
    backward pass; and once a step where the engine must look at the gradients' norm before the update (ZeRO 0).
    """
    with engine.timed("step"):
        return _step(engine, task, loader, step, stop, traces)


def _step(
    engine: Engine, task: DeblurTask, loader: Iterator[dict], step: int, stop: StopRequest, traces: Traces
) -> StepResult:
    config = engine.config
    started, worked = time.perf_counter(), time.process_time()
    distill = step < config.train.distill_steps
    rates = learning_rates(step, config)
    cfl = cfl_weight(step, config)
    wait_s, finite = 0.0, True
    means: dict[str, float] = {}
    not_finite: dict[str, None] = {}
    batches: list[dict] = []
    # Rates are set before the last backward: DeepSpeed updates inside `step()` at the accumulation boundary.
    engine.set_learning_rates(*rates)
    for batch, waited in micro_batches(loader, config.train.accumulation, engine.timed):
        beat("step")
        wait_s += waited
        traces.begin()
        with engine.timed("losses"):
            loss, parts = task.losses(engine.forward, batch, distill=distill, autocast=engine.autocast(), cfl=cfl)
        named = {"loss": loss.detach(), **parts}
        traces.end(waited)
        losses = torch.stack([*(value.double() for value in named.values()), (~torch.isfinite(named["loss"])).double()])
        flags = sent([*stop.flags(), *traces.flags()], loss.device)
        told = engine.sum(torch.cat([losses, flags]))
        told, (bad, *rest) = told[: len(named)], told[len(named) :].tolist()
        stop.take(rest[: len(REASONS)])
        traces.take(rest[len(REASONS) :])
        batches.append({name: batch[name] for name in BATCH_FACTS if name in batch})
        if bad:
            finite = False
            not_finite |= dict.fromkeys(name for name, value in named.items() if not torch.isfinite(value).all())
            loss = zero_loss(engine, task, batch, distill, cfl)
            engine.set_learning_rates(0.0, 0.0)
        engine.backward_and_step(loss)
        del loss  # with the graph behind it, before another forward pass is captured
        for name, value in zip(named, (told / engine.world).tolist(), strict=True):
            means[name] = means.get(name, 0.0) + value / config.train.accumulation
    loss_value = means.pop("loss")
    PROGRESS.done(step + 1)
    left_out = engine.left_out
    if left_out and engine.loss_scale is None:  # in fp16 that is no fault of the batch: its loss scale is lowered
        finite = False
        not_finite["gradients"] = None
    return StepResult(
        loss=loss_value,
        parts=means,
        lr=rates.prior if distill else rates.restorer or rates.spe,
        grad_norm=engine.grad_norm() if finite and logged(step + 1, config) else None,
        finite=finite and math.isfinite(loss_value),
        wait_s=wait_s,
        total_s=time.perf_counter() - started,
        cpu_s=time.process_time() - worked,
        not_finite=list(not_finite),
        batches=batches,
        overflowed=finite and left_out,
        loss_scale=engine.loss_scale,
    )


def sent(numbers: Sequence[float], device: torch.device) -> torch.Tensor:
    """Numbers as fp64 on a device, without waiting for what it is doing."""
    values = torch.tensor(numbers, dtype=torch.float64)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def zero_loss(engine: Engine, task: DeblurTask, batch: dict, distill: bool, cfl: float) -> torch.Tensor:
    """A loss whose gradient is zero, for a micro-batch that must not count: DeepSpeed wants its backward all the same
    (it counts micro-batches, and under ZeRO every rank must take part in the reduction)."""
    black = batch | {name: torch.zeros_like(batch[name]) for name in ("blurry", "sharp")}
    black.pop("features", None)  # of the true crops
    loss, _ = task.losses(engine.forward, black, distill=distill, autocast=engine.autocast(), cfl=cfl)
    if not torch.isfinite(loss):
        raise WeightsNotFiniteError(
            "the weights themselves are not finite: the run diverged; start again from its last checkpoint: --init it, "
            "with a lower optim.lr and another run.name"
        )
    return loss * 0.0
