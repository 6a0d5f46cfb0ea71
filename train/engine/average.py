"""Exponential moving average of the weights in fp32, under any ZeRO stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from train.engine.engine import Engine
from train.engine.pieces import pieces
from train.engine.zero import forget_gathered, is_divided, local_part, put, whole_shape


class Ema:
    """average ← d·average + (1 − d)·weight after every step, d = min(decay, (1 + t)/(10 + t)) for update t = 0, 1, ….

    Of the fp32 weights that the optimizer steps, where they lie (in host memory with offload): a bf16 average at .9999
    does not move, and one of rounded weights would lag behind in jumps. ZeRO ≥ 1 divides them among the ranks, so each
    averages its own pieces. decay 0 makes the average the weights themselves.
    averages: this rank's piece of each trained parameter, flat, by name; empty where it has none.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay}: expected 0 ≤ decay < 1")
        self.decay = decay
        self.updates = 0
        self._engine, self._module = engine, engine.module
        self._parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self._pieces = {piece.name: piece for piece in pieces(engine)}
        self.averages = {name: torch.empty(0) for name in self._parameters}
        self.averages |= {name: piece.read("weight").float().clone() for name, piece in self._pieces.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if self._pieces:
            weights = [piece.read("weight").float() for piece in self._pieces.values()]
            torch._foreach_lerp_([self.averages[name] for name in self._pieces], weights, 1 - decay)

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The module computes with the averages, rounded to its type, inside the block; the weights come back bit for
        bit. Collective."""
        forget_gathered(self._module)
        kept = {name: local_part(p).clone() for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            self._put(name, parameter)
        try:
            yield
        finally:
            forget_gathered(self._module)
            for name, parameter in self._parameters.items():
                local_part(parameter).copy_(kept[name])

    @torch.no_grad()
    def settle(self, chosen: Callable[[str], bool]) -> None:
        """Let the averages of the parameters that `chosen` knows by name be their weights from now on. Collective."""
        forget_gathered(self._module)
        for name, parameter in self._parameters.items():
            if chosen(name):
                self._put(name, parameter)
                if (piece := self._pieces.get(name)) is not None:
                    piece.write("weight", self.averages[name])

    def _put(self, name: str, parameter: Tensor) -> None:
        """The average in place of what the forward pass reads."""
        if is_divided(parameter):
            put(local_part(parameter), 0, self.averages[name])
        else:
            local_part(parameter).copy_(self.whole(name))

    def parts(self) -> list[tuple[str, int, int]]:
        """(name, start, count) of what this rank averages: elements [start, start + count) of the flat parameter."""
        return [(name, piece.start, piece.count) for name, piece in self._pieces.items()]

    def read(self, name: str) -> Tensor:
        """This rank's part of an average, flat [count]."""
        return self.averages[name]

    def write(self, name: str, values: Tensor) -> None:
        """Take up what `read` gave, on the same part."""
        self.averages[name].copy_(values)

    @torch.no_grad()
    def whole(self, name: str) -> Tensor:
        """A whole average in the parameter's shape, on every rank and the engine's device; collective with ZeRO."""
        shape = whole_shape(self._parameters[name])
        if not self._engine.config.engine.zero:
            return self.averages[name].view(shape)
        values = torch.zeros(shape.numel(), device=self._engine.device)
        if (piece := self._pieces.get(name)) is not None:
            values[piece.start : piece.start + piece.count] = self.averages[name].to(values.device)
        if self._engine.world > 1:
            torch.distributed.all_reduce(values)  # the pieces do not overlap: a sum puts them side by side
        return values.view(shape)
