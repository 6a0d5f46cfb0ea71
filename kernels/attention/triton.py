"""Semantic attention by Triton kernels, under the names that reference.py gives the same steps."""

from torch import Tensor

from kernels.attention.algebra import Weights
from kernels.attention.algebra_launch import fused_modulation, fused_modulation_backward
from kernels.attention.triton_backward import gradient_pass, reduce_pass
from kernels.attention.triton_forward import apply_pass, gram_pass


def forward(x: Tensor, p: Tensor, weights: Weights, eps: float, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y of x [B, C, N] and p [B, D, N], written into y; mean and 1/std [B, N], and the state [B, state_size]."""
    moments, state, mean, rstd = gram_pass(x, p, eps)
    apply_pass(x, p, mean, rstd, fused_modulation(x, p, moments, state, weights), y)
    return mean, rstd, state


def backward(
    dy: Tensor,
    x: Tensor,
    p: Tensor,
    weights: Weights,
    mean: Tensor,
    rstd: Tensor,
    state: Tensor,
    dx: Tensor,
    dp: Tensor,
) -> Weights:
    """The weights' gradients; those of x and p are written into dx and dp."""
    d_modulation = reduce_pass(dy, x, p, mean, rstd)
    coefficients, d_weights = fused_modulation_backward(x, p, state, weights, d_modulation)
    gradient_pass(dy, x, p, mean, rstd, coefficients, dx, dp)
    return d_weights
