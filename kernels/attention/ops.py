"""Registered operators of semantic attention: schemas, shapes, autograd. Imports no triton.

`sharpprior::semantic_attention` and its `_backward` are opaque to the compiler and to checkpointing. `kernel` chooses
the Triton passes (a GPU, or the interpreter) or the PyTorch passes of reference.py.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention import reference
from kernels.attention.algebra import Weights, gram_size
from kernels.attention.algebra_state import state_size
from kernels.runtime import accumulator, new_map, pixel_strides, plane_like

_LIBRARY = torch.library.Library("sharpprior", "FRAGMENT")
_WEIGHTS = (
    "Tensor norm_weight, Tensor norm_bias, Tensor query_weight, Tensor key_weight, Tensor value_weight, "
    "Tensor temperature, Tensor out_weight, Tensor scale"
)
_LIBRARY.define(
    f"semantic_attention(Tensor x, Tensor p, {_WEIGHTS}, float eps, bool kernel) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"semantic_attention_backward(Tensor dy, Tensor x, Tensor p, {_WEIGHTS}, Tensor mean, Tensor rstd, Tensor grams, "
    "bool kernel) -> (" + ", ".join(["Tensor"] * 10) + ")"
)


def _passes(kernel: bool):
    if not kernel:
        return reference
    from kernels.attention import triton  # lazily: a machine without a GPU need not have it

    return triton


def forward(x: Tensor, p: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y as x, mean and 1/std [B, N], and the algebra's state [B, ·]; weights in the accumulator's dtype.

    The state is the flat Grams (C² + C·D + D² + C + D); the kernels append what their backward reads again.
    """
    *weights, eps, kernel = rest
    y = new_map(x)
    return y, *_passes(kernel).forward(_flat(x), _flat(p), Weights(*weights), eps, _flat(y))


def backward(dy: Tensor, x: Tensor, p: Tensor, *rest) -> tuple[Tensor, ...]:
    """dx, dp and the eight weights' gradients."""
    *weights, mean, rstd, state, kernel = rest
    dx, dp = new_map(x), new_map(p)
    maps = (_flat(plane_like(dy, x)), _flat(x), _flat(p))
    d_weights = _passes(kernel).backward(*maps, Weights(*weights), mean, rstd, state, _flat(dx), _flat(dp))
    return dx, dp, *d_weights


def _flat(plane: Tensor) -> Tensor:
    """[B, C, N] view of a plane (see runtime.as_plane): the passes know pixels, not rows."""
    B, C, H, W = plane.shape
    return plane.as_strided((B, C, H * W), pixel_strides(plane))


def _forward_shapes(x: Tensor, p: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulator(x.dtype)
    B, C, H, W = x.shape
    pixel = x.new_empty(B, H * W, dtype=acc)
    size = (state_size if rest[-1] else gram_size)(C, p.shape[1])
    return new_map(x), pixel, torch.empty_like(pixel), x.new_empty(B, size, dtype=acc)


def _backward_shapes(dy: Tensor, x: Tensor, p: Tensor, *rest) -> tuple[Tensor, ...]:
    return new_map(x), new_map(p), *(torch.empty_like(weight) for weight in rest[:8])


for _name, _body, _shapes in (
    ("semantic_attention", forward, _forward_shapes),
    ("semantic_attention_backward", backward, _backward_shapes),
):
    # The same body for every device: `kernel` has already been chosen, by name, in api.py.
    _LIBRARY.impl(_name, _body, "CPU")
    _LIBRARY.impl(_name, _body, "CUDA")
    torch.library.register_fake(f"sharpprior::{_name}", _shapes, lib=_LIBRARY)


class SemanticAttention(torch.autograd.Function):
    """Autograd of the registered operators: saves x, p, the weights, two numbers a pixel and the Grams."""

    @staticmethod
    def forward(ctx, x, p, *rest):
        *weights, eps, kernel = rest
        y, mean, rstd, grams = torch.ops.sharpprior.semantic_attention(x, p, *weights, eps, kernel)
        ctx.save_for_backward(x, p, *weights, mean, rstd, grams)
        ctx.kernel = kernel
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        # A backward inside an autocast region must compute as the forward did: its algebra in the accumulator's type.
        with torch.autocast(dy.device.type, enabled=False):
            grads = torch.ops.sharpprior.semantic_attention_backward(dy, *ctx.saved_tensors, ctx.kernel)
        wanted = zip(grads, ctx.needs_input_grad, strict=False)
        return *(grad if needed else None for grad, needed in wanted), None, None
