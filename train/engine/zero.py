"""How ZeRO keeps parameters: whole ones, and the parts that a rank has under stage 3."""

from __future__ import annotations

import contextlib

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


def zero3_gathered(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager:
    """Whole parameters inside the block under ZeRO-3 (collective); nothing to do otherwise."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters)
    return contextlib.nullcontext()


def trainable(module: nn.Module) -> int:
    """Number of trained parameters, whole under ZeRO-3 too."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _start(parameter: nn.Parameter) -> int:
    return parameter.ds_tensor.numel() * torch.distributed.get_rank() if hasattr(parameter, "ds_id") else 0
