"""Where a training step's time goes: wall-clock shares of the model's parts, by hooks that cost microseconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from model.deblurrer import Deblurrer


class StepShares:
    """Measures the forward passes of a deblurrer's parts and of its teacher, in training steps only.

    Seconds come from the clock on a CPU, and from events in the stream on a GPU, which never make it wait: they are
    read in `take`, after the step's loss has been read. The backward pass (with its reductions) and the update are
    timed as wholes, where the engine calls `timed` around them; `rest` is everything else.
    """

    def __init__(self, module: Deblurrer, teacher: nn.Module | None = None) -> None:
        self._root, self._open = module, {}
        self._closed: dict[str, list] = {"backward": [], "update": []}
        self._gpu = next(module.parameters()).device.type == "cuda"
        parts: dict[str, list[nn.Module]] = {"backbone": [module.backbone], "spe": list(module.spe.values())}
        if module.prior is not None:
            parts |= {"prior": [module.prior], "student": [module.prior.student]}
        if teacher is not None:
            parts["teacher"] = [teacher]
        for name, members in parts.items():
            self._closed[name] = []
            for member in members:
                member.register_forward_pre_hook(lambda *_, name=name: self._start(name))
                member.register_forward_hook(lambda *_, name=name: self._stop(name))

    def take(self, seconds: float, waited: float) -> dict[str, float]:
        """Shares (sum 1) of a step of `seconds`, of which it `waited` for data, by part; what was measured is reset.

        student, fusion, spe, backbone and teacher are forward passes.
        """
        spent = {name: sum(map(self._seconds, pairs)) for name, pairs in self._closed.items()}
        for pairs in self._closed.values():
            pairs.clear()
        self._open.clear()
        # The embeddings are called by the backbone, and the student by the prior.
        spent["backbone"] = max(0.0, spent["backbone"] - spent["spe"])
        if "prior" in spent:
            spent["fusion"] = max(0.0, spent.pop("prior") - spent["student"])
        spent["data"] = waited
        spent["rest"] = max(0.0, seconds - sum(spent.values()))
        whole = sum(spent.values())
        return {name: value / whole for name, value in spent.items()}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the block as `backward` or `update`."""
        started = self._now()
        yield
        self._closed[name].append((started, self._now()))

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _start(self, name: str) -> None:
        if self._root.training:
            self._open[name] = self._now()

    def _stop(self, name: str) -> None:
        # Without a start the pass began before the last `take`, or in an evaluation.
        if self._root.training and name in self._open:
            self._closed[name].append((self._open.pop(name), self._now()))

    def _seconds(self, pair: tuple[Any, Any]) -> float:
        start, stop = pair
        return start.elapsed_time(stop) / 1000 if self._gpu else stop - start


def mean_shares(records: list[dict]) -> dict[str, float]:
    """Mean shares over the logged steps of the records, which carry them as `shares`, each stage's parts alone: steps
    that train the whole model where there are some, else those that distill."""
    measured = [record["shares"] for record in records if record.get("shares")]
    whole = [shares for shares in measured if shares.get("backbone", 0) > 0]
    chosen = (whole or measured)[1:] or whole or measured  # the first step warms up
    return {name: sum(each.get(name, 0.0) for each in chosen) / len(chosen) for name in chosen[0]} if chosen else {}
