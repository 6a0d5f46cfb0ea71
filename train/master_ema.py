"""The average of 16-bit runs: of the fp32 master weights, which the 16-bit parameters are only a rounding of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from train.ema import Ema, forget_gathered, local_part, put
from train.engine import Engine
from train.precision import SIXTEEN_BIT_PARAMETERS
from train.universal import Piece, pieces


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
