"""Where a training step's time goes: shares of the model's parts, by hooks that cost microseconds."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from model.deblurrer import Deblurrer

Pairs = dict[str, list[tuple[Any, Any]]]
WHOLES = ("step", "data", "forward", "backward", "update")  # what the loop and the engine call `timed` around
TELLING_STEPS = 3  # eager steps of a stage, the first not counted, whose mean says what a forward pass consists of


class _Step(NamedTuple):
    pairs: Pairs
    seconds: float
    waited: float


class StepShares:
    """Measures the forward passes of a deblurrer's parts and of its teacher, in training steps only.

    Times come from the clock on a CPU, and on a GPU, which the clock runs ahead of, from events in its stream; those
    are read when the GPU has passed them, in a later step, so that nothing ever waits for it.

    The step, the wait for data, the backward pass (with its reductions) and the update are timed as wholes; `rest` is
    everything else. A forward pass that is replayed has no parts and counts whole, as `forward`. recording: whether
    hooks are called by something that is no step (`Graphs.recording`).
    """

    def __init__(
        self, module: Deblurrer, teacher: nn.Module | None = None, recording: Callable[[], bool] = lambda: False
    ) -> None:
        self._root, self._recording = module, recording
        self._gpu = next(module.parameters()).device.type == "cuda"
        self._open: dict[str, Any] = {}
        self._steps: deque[_Step] = deque()
        self._newest: dict[str, float] = {}
        self._eager: dict[str, list[dict[str, float]]] = {}
        parts: dict[str, list[nn.Module]] = {"backbone": [module.backbone], "spe": list(module.spe.values())}
        if module.gate is not None:
            parts["gate"] = [module.gate]
        if module.prior is not None:
            parts |= {"prior": [module.prior], "student": [module.prior.student]}
        if teacher is not None:
            parts["teacher"] = [teacher]
        self._names = (*WHOLES, *parts)
        self._closed = self._fresh()
        for name, members in parts.items():
            for member in members:
                member.register_forward_pre_hook(_resting(self._start, name))
                member.register_forward_hook(_resting(self._stop, name))

    def take(self, seconds: float, waited: float) -> dict[str, float]:
        """End a step of `seconds` by the clock, of which it `waited` for data. Returns the shares (sum 1) by part of
        the newest step whose times are known: this one on a CPU; on a GPU mostly the one before; {} before the first.

        student, fusion, spe, backbone and teacher are forward passes.
        """
        self._steps.append(_Step(self._closed, seconds, waited))
        self._closed = self._fresh()
        self._open.clear()
        while self._steps and self._passed(self._steps[0]):
            self._newest = self._shares(self._steps.popleft())
        return self._newest

    def new_parts(self) -> tuple[str, dict[str, float]] | None:
        """(stage, shares of an eager forward pass by part, sum 1): once a stage, when enough steps of it are known."""
        for stage, steps in self._eager.items():
            if len(steps) == TELLING_STEPS:
                steps.append({})  # told
                sums = {name: sum(each[name] for each in steps[1:TELLING_STEPS]) for name in steps[0]}
                whole = sum(sums.values())
                return stage, {name: value / whole for name, value in sums.items() if value > 0}
        return None

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the block, where it is one of `WHOLES`."""
        if name not in WHOLES:
            yield
            return
        started, parts = self._now(), self._parts_closed()
        yield
        if name != "forward" or self._parts_closed() == parts:
            self._closed[name].append((started, self._now()))

    def _parts_closed(self) -> int:
        return len(self._closed["backbone"]) + len(self._closed.get("prior", ()))

    def _shares(self, step: _Step) -> dict[str, float]:
        spent = {name: sum(map(self._seconds, pairs)) for name, pairs in step.pairs.items()}
        whole, waited = spent.pop("step"), spent.pop("data")
        if not self._gpu:
            whole, waited = step.seconds, step.waited
        # The embeddings are called by the backbone, and the student by the prior.
        spent["backbone"] = max(0.0, spent["backbone"] - spent["spe"])
        if "prior" in spent:
            spent["fusion"] = max(0.0, spent.pop("prior") - spent["student"])
        if not step.pairs["forward"]:
            del spent["forward"]
            self._keep_parts(spent)
        spent["data"] = waited
        spent["rest"] = max(0.0, whole - sum(spent.values()))
        whole = sum(spent.values())
        return {name: value / whole for name, value in spent.items()}

    def _keep_parts(self, spent: dict[str, float]) -> None:
        parts = {name: spent[name] for name in ("student", "fusion", "spe", "backbone", "gate") if name in spent}
        steps = self._eager.setdefault("deblur" if spent["backbone"] > 0 else "distill", [])
        if sum(parts.values()) > 0 and len(steps) < TELLING_STEPS:
            steps.append(parts)

    def _fresh(self) -> Pairs:
        return {name: [] for name in self._names}

    def _passed(self, step: _Step) -> bool:
        """Whether the GPU has done all that the step measured."""
        return not self._gpu or all(stop.query() for pairs in step.pairs.values() for _, stop in pairs[-1:])

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _start(self, name: str) -> None:
        if self._root.training and not self._recording():
            self._open[name] = self._now()

    def _stop(self, name: str) -> None:
        # Without a start the pass began before the last `take`, or in an evaluation.
        if self._root.training and not self._recording() and name in self._open:
            self._closed[name].append((self._open.pop(name), self._now()))

    def _seconds(self, pair: tuple[Any, Any]) -> float:
        start, stop = pair
        return start.elapsed_time(stop) / 1000 if self._gpu else stop - start


def _resting(call: Callable[[str], None], name: str) -> Callable[..., None]:
    """A module's hook that need not be called where the module's passes are replayed (train/engine/graphs.py)."""

    def hook(*_: Any) -> None:
        call(name)

    hook.may_rest = True
    return hook


def mean_shares(records: list[dict]) -> dict[str, float]:
    """Mean shares over the logged steps of the records, which carry them as `shares`: of steps that train the whole
    model where there are some, else of those that distill; of replayed ones where there are some."""
    measured = [record for record in records if record.get("shares")]
    whole = [r for r in measured if "pixel" in r or r["shares"].get("backbone", 0) > 0]
    shares = [record["shares"] for record in whole or measured]
    replayed = [each for each in shares if "forward" in each]
    chosen = replayed or shares[1:] or shares  # the first step warms up
    return {name: sum(each.get(name, 0.0) for each in chosen) / len(chosen) for name in chosen[0]} if chosen else {}
