"""Registered operators of multi-level aggregation: schemas, shapes, autograd. Imports no triton.

`kernel` chooses the Triton kernels (a GPU, or the interpreter) or the PyTorch passes of reference.py.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.aggregation import reference
from kernels.runtime import accumulator, new_map, plane_like

_LIBRARY = torch.library.Library("sharpprior", "FRAGMENT")
_LIBRARY.define(
    "aggregate_levels(Tensor[] values, Tensor[] logits, SymInt height, SymInt width, bool kernel) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "aggregate_levels_backward(Tensor dp, Tensor[] values, Tensor[] logits, Tensor lse, bool kernel) -> Tensor[]"
)


def _passes(kernel: bool):
    if not kernel:
        return reference
    from kernels.aggregation import triton  # lazily: a machine without a GPU need not have it

    return triton


def forward(values: list[Tensor], logits: list[Tensor], height: int, width: int, kernel: bool) -> tuple[Tensor, Tensor]:
    """P [B, D, H, W], laid out as the first level, and the log-sum-exp of the logits [B, G, H, W]."""
    out = new_map(values[0], (*values[0].shape[:2], height, width))
    lse = _passes(kernel).forward_pass(values, logits, out)
    return out, lse


def backward(dp: Tensor, values: list[Tensor], logits: list[Tensor], lse: Tensor, kernel: bool) -> list[Tensor]:
    """Gradients of the values, then of the logits."""
    d_values, d_logits = [new_map(v) for v in values], [new_map(a) for a in logits]
    _passes(kernel).backward_pass(plane_like(dp, values[0]), values, logits, lse, d_values, d_logits)
    return d_values + d_logits


def _forward_shapes(values, logits, height, width, kernel):
    first = values[0]
    out = new_map(first, (first.shape[0], first.shape[1], height, width))
    lse = first.new_empty(first.shape[0], logits[0].shape[1], height, width, dtype=accumulator(first.dtype))
    return out, lse


def _backward_shapes(dp, values, logits, lse, kernel):
    return [new_map(tensor) for tensor in (*values, *logits)]


for _name, _body, _shapes in (
    ("aggregate_levels", forward, _forward_shapes),
    ("aggregate_levels_backward", backward, _backward_shapes),
):
    _LIBRARY.impl(_name, _body, "CPU")
    _LIBRARY.impl(_name, _body, "CUDA")
    torch.library.register_fake(f"sharpprior::{_name}", _shapes, lib=_LIBRARY)


class AggregateLevels(torch.autograd.Function):
    """Autograd of the registered operators: saves the levels as they are and one number a target pixel and group."""

    @staticmethod
    def forward(ctx, height, width, kernel, *levels):
        count = len(levels) // 2
        values, logits = list(levels[:count]), list(levels[count:])
        out, lse = torch.ops.sharpprior.aggregate_levels(values, logits, height, width, kernel)
        ctx.save_for_backward(lse, *levels)
        ctx.kernel = kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dp):
        lse, *levels = ctx.saved_tensors
        count = len(levels) // 2
        with torch.autocast(dp.device.type, enabled=False):
            grads = torch.ops.sharpprior.aggregate_levels_backward(dp, levels[:count], levels[count:], lse, ctx.kernel)
        wanted = zip(grads, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(grad if needed else None for grad, needed in wanted)
