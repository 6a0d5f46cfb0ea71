"""Exponential moving average of the weights in fp32, under any ZeRO stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def local_part(parameter: Tensor) -> Tensor:
    """What this rank stores of a parameter: all of it, or its own partition under ZeRO-3."""
    return parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter.data


def stretch(tensor: Tensor, offset: int, count: int) -> Tensor:
    """Elements [offset, offset + count) of a tensor in logical order, flat: a view, or a copy of a strided one."""
    return tensor.reshape(-1)[offset : offset + count]


def put(tensor: Tensor, offset: int, values: Tensor) -> None:
    """Put flat values into a tensor from an element on, in logical order whatever its strides are."""
    if tensor.is_contiguous():
        tensor.view(-1)[offset : offset + values.numel()].copy_(values)
    else:  # channels last: such tensors are only ever taken up whole
        tensor.copy_(values.view(tensor.shape))


def forget_gathered(module: nn.Module) -> None:
    """ZeRO-3 keeps small parameters whole after their first use; that copy would hide a change of the partition."""
    for parameter in module.parameters():
        if hasattr(parameter, "ds_id") and parameter.ds_status.name == "AVAILABLE":
            parameter.partition()


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
