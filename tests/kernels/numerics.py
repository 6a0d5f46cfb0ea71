"""The tolerance rule: an error against fp64 is compared with that of the same computation in eager PyTorch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def with_gradients(function: Callable[[list[Tensor]], Tensor], inputs: Sequence[Tensor], seed: int = 7) -> list[Tensor]:
    """Output and the gradients of all inputs for a random upstream gradient that depends on the shape alone."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def assert_close_as_eager(tested, eager, exact, dtype: torch.dtype, rms: float) -> None:
    """|tested − exact| ≤ 3·(|eager − exact|∞ + eps·|exact|∞), and the RMS of the error ≤ rms of the RMS of exact.

    3: eager's own largest error differs by half with the vector units of the CPU that sums (2.4 times was seen on one).
    """
    eps = torch.finfo(dtype).eps
    for index, (a, b, truth) in enumerate(zip(tested, eager, exact, strict=True)):
        a, b = a.double(), b.double()
        assert a.shape == truth.shape
        bound = 3 * ((b - truth).abs().max() + eps * truth.abs().max())
        error = (a - truth).abs().max()
        assert error <= bound, f"result {index}: error {error:.3e} above {bound:.3e}"
        relative = (a - truth).square().mean().sqrt() / truth.square().mean().sqrt().clamp_min(1e-300)
        assert relative <= rms, f"result {index}: relative RMS {relative:.3e} above {rms:.1e}"


def fenced_copy(tensor: Tensor) -> Tensor:
    """The same values and strides, with NaN before and after them in memory."""
    margin = 1024
    store = torch.full((tensor.numel() + 2 * margin,), float("nan"), dtype=tensor.dtype)
    copy = store.as_strided(tensor.shape, tensor.stride(), margin)
    copy.copy_(tensor)
    return copy
