"""How ZeRO keeps parameters: whole ones, and under stage 3 the equal part that each rank has of every one."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn


def is_divided(parameter: Tensor) -> bool:
    """Whether this rank stores a part of it only: ZeRO 3."""
    return hasattr(parameter, "ds_id")


def local_part(parameter: Tensor) -> Tensor:
    """What this rank stores of a parameter: all of it, or its own part, whose end may be padding."""
    return parameter.ds_tensor if is_divided(parameter) else parameter.data


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of all of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def local_span(parameter: Tensor) -> tuple[int, int]:
    """(start, count) of this rank's part in the flat parameter, without padding."""
    numel = whole_shape(parameter).numel()
    if not is_divided(parameter):
        return 0, numel
    length = parameter.ds_tensor.numel()
    start = length * torch.distributed.get_rank()
    return start, max(0, min(length, numel - start))


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
        if is_divided(parameter) and parameter.ds_status.name == "AVAILABLE":
            parameter.partition()


def zero3_gathered(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager:
    """Whole parameters inside the block under ZeRO-3 (collective); nothing to do otherwise."""
    if any(is_divided(parameter) for parameter in parameters):
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters)
    return contextlib.nullcontext()


def trainable(module: nn.Module) -> int:
    """Number of trained parameters, whole under ZeRO-3 too."""
    return sum(whole_shape(p).numel() for p in module.parameters() if p.requires_grad)
