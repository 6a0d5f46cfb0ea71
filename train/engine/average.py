"""Exponential moving average of the weights in fp32, under any ZeRO stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from train.engine.engine import Engine
from train.engine.pieces import Piece, pieces
from train.engine.precision import SIXTEEN_BIT_PARAMETERS
from train.engine.zero import forget_gathered, local_part, put, stretch


class Ema:
    """average ← d·average + (1 − d)·weight after every step, d = min(decay, (1 + t)/(10 + t)) for update t = 0, 1, ….

    Kept in fp32 whatever the weights are (a bf16 average at .9999 does not move). Under ZeRO-3 every rank averages its
    own partition, so the memory is divided as the weights' is. decay 0 makes the average the weights themselves.
    device: where collectives are done; None: where the averages are.
    """

    divided = False  # whether each rank has parts of its own under every ZeRO stage: `MasterEma`

    def __init__(self, module: nn.Module, decay: float, device: torch.device | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay}: expected 0 ≤ decay < 1")
        self.decay = decay
        self.updates = 0
        self._module, self._device = module, device
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.averages = {name: local_part(p).detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages = list(self.averages.values())
        weights = [local_part(p).float() for p in self._parameters.values()]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The module computes with the averages inside the block; the weights come back bit for bit."""
        forget_gathered(self._module)
        kept = {name: local_part(p).clone() for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            local_part(parameter).copy_(self.averages[name])
        try:
            yield
        finally:
            forget_gathered(self._module)
            for name, parameter in self._parameters.items():
                local_part(parameter).copy_(kept[name])

    def parts(self) -> list[tuple[str, int, int]]:
        """(name, start, count) of what this rank averages: elements [start, start + count) of the flat parameter."""
        spans = [(name, *self._span(name)) for name in self.averages]
        return [(name, start, count) for name, start, count in spans if count > 0]

    def _span(self, name: str) -> tuple[int, int]:
        parameter = self._parameters[name]
        if not hasattr(parameter, "ds_id"):
            return 0, parameter.numel()
        length = parameter.ds_tensor.numel()
        start = length * torch.distributed.get_rank()
        return start, max(0, min(length, parameter.ds_numel - start))

    def read(self, name: str) -> Tensor:
        """This rank's part of an average, flat [count], without ZeRO-3's padding."""
        return stretch(self.averages[name], 0, self._span(name)[1])

    def write(self, name: str, values: Tensor) -> None:
        """Take up what `read` gave, on the same part."""
        put(self.averages[name], 0, values)

    def whole(self, name: str) -> Tensor:
        """A whole average in the parameter's shape, on every rank; collective under ZeRO-3."""
        average, parameter = self.averages[name], self._parameters[name]
        if not hasattr(parameter, "ds_id"):
            return average
        average = average.to(self._device)  # offloaded to the host, where GPUs' collectives do not reach
        parts = [torch.empty_like(average) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, average)
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)


def averages_of(engine: Engine, decay: float) -> Ema:
    """The average that fits a wrapped engine's precision."""
    sixteen = engine.config.engine.precision in SIXTEEN_BIT_PARAMETERS
    return MasterEma(engine, decay) if sixteen else Ema(engine.module, decay, engine.device)


class MasterEma(Ema):
    """`Ema` of DeepSpeed's fp32 master weights, which ZeRO ≥ 1 divides among the ranks: each averages the pieces that
    its optimizer owns, where they lie (in host memory with offload).

    A step of bf16 moves a weight by less than its rounding for most of a training, so an average of the rounded weights
    would lag behind in jumps.
    """

    divided = True

    def __init__(self, engine: Engine, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay}: expected 0 ≤ decay < 1")
        self.decay = decay
        self.updates = 0
        self._engine, self._module = engine, engine.module
        self._parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self._pieces: dict[str, Piece] = {piece.name: piece for piece in pieces(engine)}
        none = torch.empty(0)
        self.averages = {
            name: self._pieces[name].read("weight").detach().clone() if name in self._pieces else none
            for name in self._parameters
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the master weights after an optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages = [self.averages[name] for name in self._pieces]
        weights = [piece.read("weight") for piece in self._pieces.values()]
        if averages:
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The module computes with the averages, rounded to its type, inside the block; the weights come back bit for
        bit. Collective."""
        forget_gathered(self._module)
        kept = {name: local_part(p).clone() for name, p in self._parameters.items()}
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if hasattr(parameter, "ds_id"):
                    put(local_part(parameter), 0, self.averages[name])
                else:
                    local_part(parameter).copy_(self.whole(name))
        try:
            yield
        finally:
            forget_gathered(self._module)
            for name, parameter in self._parameters.items():
                local_part(parameter).copy_(kept[name])

    def _span(self, name: str) -> tuple[int, int]:
        piece = self._pieces.get(name)
        return (0, 0) if piece is None else (piece.start, piece.count)

    @torch.no_grad()
    def whole(self, name: str) -> Tensor:
        """A whole average in the parameter's shape, on every rank; collective."""
        parameter = self._parameters[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        start, count = self._span(name)
        values = torch.zeros(shape.numel(), device=self._engine.device)
        values[start : start + count] = self.averages[name].to(values.device)
        if self._engine.world > 1:
            torch.distributed.all_reduce(values)  # the pieces do not overlap: a sum puts them side by side
        return values.view(shape)
