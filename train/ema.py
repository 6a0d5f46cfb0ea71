"""Exponential moving average of the weights in fp32, under any ZeRO stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def _local(parameter: nn.Parameter) -> Tensor:
    """What this rank stores of a parameter: all of it, or its own partition under ZeRO-3."""
    return parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter.data


class Ema:
    """average ← d·average + (1 − d)·weight after every step, d = min(decay, (1 + t)/(10 + t)) for update t = 0, 1, ….

    Kept in fp32 whatever the weights are (a bf16 average at .9999 does not move). Under ZeRO-3 every rank averages its
    own partition, so the memory is divided as the weights' is. decay 0 makes the average the weights themselves.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay}: expected 0 ≤ decay < 1")
        self.decay = decay
        self.updates = 0
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.averages = {name: _local(p).detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages = list(self.averages.values())
        weights = [_local(p).float() for p in self._parameters.values()]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The module computes with the averages inside the block; the weights come back bit for bit."""
        self._forget_gathered()
        kept = {name: _local(p).clone() for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            _local(parameter).copy_(self.averages[name])
        try:
            yield
        finally:
            self._forget_gathered()
            for name, parameter in self._parameters.items():
                _local(parameter).copy_(kept[name])

    def _forget_gathered(self) -> None:
        """ZeRO-3 keeps small parameters whole after their first use; that copy would hide a change of the partition."""
        for parameter in self._parameters.values():
            if hasattr(parameter, "ds_id") and parameter.ds_status.name == "AVAILABLE":
                parameter.partition()

    def state_dict(self) -> dict[str, object]:
        """This rank's part of the state."""
        return {"updates": self.updates, "decay": self.decay, "averages": self.averages}

    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` gave on the same rank of a run of the same size. ValueError if names differ."""
        if state["averages"].keys() != self.averages.keys():
            odd = sorted(state["averages"].keys() ^ self.averages.keys())
            raise ValueError(f"the averaged weights in the checkpoint belong to another model: {odd[0]} differs")
        self.updates = state["updates"]
        for name, average in state["averages"].items():
            if average.shape != self.averages[name].shape:
                raise ValueError(f"averaged weight {name} has shape {tuple(average.shape)} in the checkpoint")
            self.averages[name].copy_(average)
