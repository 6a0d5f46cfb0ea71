"""What a rank's optimizer owns of the trained parameters, under each of DeepSpeed's optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.engine.engine import Engine
from train.engine.zero import local_span, put, stretch

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """What this rank's optimizer owns of a trained parameter: elements [start, start + count) of it, flat.

    flat: the tensor that `optimizer` steps, fp32; offset: where the piece starts in it.
    """

    name: str
    start: int
    count: int
    flat: Tensor
    offset: int
    optimizer: torch.optim.Optimizer

    def read(self, key: str) -> Tensor:
        """`weight` or a moment, flat [count], a view where possible; zero where the optimizer has no state yet."""
        source = self.flat.data if key == "weight" else self._state.get(key)
        return self.flat.data.new_zeros(self.count) if source is None else stretch(source, self.offset, self.count)

    def write(self, key: str, values: Tensor) -> None:
        """Put values [count] into the optimizer; its state must be there (`fresh_optimizer_state`)."""
        put(self.flat.data if key == "weight" else self._state[key], self.offset, values)

    @property
    def updates(self) -> int:
        """How often the optimizer has updated the parameter."""
        return int(self._state.get("step", 0))

    def set_updates(self, count: int) -> None:
        """Set the number that Adam's bias correction counts by."""
        self._state["step"] = torch.full_like(self._state["step"], count)

    @property
    def _state(self) -> dict[str, Any]:
        return self.optimizer.state[self.flat]


def pieces(engine: Engine) -> list[Piece]:
    """What this rank's optimizer owns, in the order of the module's parameters; only pieces with elements."""
    outer = engine.engine.optimizer
    find = _finder(outer)
    found = []
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            piece = find(name, parameter)
            if piece is not None and piece.count > 0:
                found.append(piece)
    return found


def _finder(outer: Any) -> Callable[[str, nn.Parameter], Piece | None]:
    """How to find a parameter's piece under each of DeepSpeed's optimizers."""
    if isinstance(outer, torch.optim.Optimizer):  # ZeRO 0 without a second precision: the parameters themselves
        return lambda name, p: Piece(name, 0, p.numel(), p, 0, outer)
    base = outer.optimizer
    if hasattr(outer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        return lambda name, p: _partitioned_piece(outer, name, p)
    if hasattr(outer, "fp16_groups") and hasattr(outer, "fp32_groups"):  # ZeRO 0 in fp16: a whole fp32 copy a parameter
        pairs = zip(outer.fp16_groups, outer.fp32_groups, strict=True)
        copies = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
        return lambda name, p: Piece(name, 0, p.numel(), copies[id(p)], 0, base)
    return lambda name, p: _fragment_piece(base, name, p)


def _fragment_piece(base: torch.optim.Optimizer, name: str, parameter: nn.Parameter) -> Piece | None:
    """ZeRO 1 and 2: a rank owns a stretch of each group's flat parameters, which may begin inside a parameter."""
    if not hasattr(parameter, "_hp_mapping"):
        raise RuntimeError(f"{name}: DeepSpeed's optimizer {type(base).__name__} keeps it in no form that we know")
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    place = mapping.hp_fragment_address
    flat = base.param_groups[mapping.param_group_index]["params"][0]
    return Piece(name, mapping.lp_fragment_address.start, place.numel, flat, place.start, base)


def _partitioned_piece(outer: Any, name: str, parameter: nn.Parameter) -> Piece:
    """ZeRO 3: a rank owns an equal part of every parameter; the last part is padded."""
    group, offset, _ = outer.grad_position[outer.get_param_id(parameter)]
    if outer._swappable_optimizer_subgroup(group):
        raise ValueError("checkpoints of optimizer states on NVMe are not written: use engine.offload cpu")
    return Piece(name, *local_span(parameter), outer.fp32_partitioned_groups_flat[group], offset, outer.optimizer)


def fresh_optimizer_state(engine: Engine) -> None:
    """Give the optimizer the empty state that its first step would make, so that moments can be put into it."""
    for piece in pieces(engine):
        state = piece.optimizer.state[piece.flat]
        if state:
            continue
        for key in MOMENTS:
            state[key] = torch.zeros_like(piece.flat.data, dtype=torch.float32)
        on_device = any(group.get("fused") or group.get("capturable") for group in piece.optimizer.param_groups)
        state["step"] = torch.zeros((), dtype=torch.float32, device=piece.flat.device if on_device else "cpu")


def forget_updates(engine: Engine, rested: Callable[[str], bool]) -> None:
    """Let the optimizer take the parameters whose names `rested` knows for new: no moments, no update counted.

    DeepSpeed hands the optimizer zeros where there was no gradient, so that Adam counts updates that never were; its
    bias correction would then be over before the first true one (of 0.32 times its size with β .9/.9).
    """
    for piece in pieces(engine):
        if rested(piece.name) and piece.optimizer.state.get(piece.flat):
            for key in MOMENTS:
                piece.write(key, torch.zeros_like(piece.read(key)))
            piece.set_updates(0)


def forget_gradients(engine: Engine) -> None:
    """Between two steps: let the parameters that will get no gradients from now on have none.

    DeepSpeed 0.19.8 keeps the last gradient of such a parameter in its buffers under ZeRO 3 and with offloading, and
    goes on to count it in the norm that clips, and to step by it.
    """
    outer = engine.engine.optimizer
    buffer = getattr(outer, "grad_partitions_flat_buffer", None)
    if isinstance(buffer, Tensor):
        buffer.zero_()
    getattr(outer, "norm_for_param_grads", {}).clear()
    for piece in pieces(engine):
        if piece.flat.grad is not None:
            piece.flat.grad.zero_()
