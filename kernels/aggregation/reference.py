"""Multi-level aggregation in plain PyTorch: the composed form (the oracle) and the passes that a CPU runs."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime import accumulator


def composed_aggregation(values: Sequence[Tensor], logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Resample every level to `size`, softmax over the levels, sum: the oracle, in the inputs' dtype.

    values [B, D, h_l, w_l], logits [B, G, h_l, w_l] → [B, D, H, W]; the softmax in fp32 (fp64 for fp64).
    """
    acc = accumulator(values[0].dtype)
    resampled = torch.stack([F.interpolate(v, size, mode="bilinear", align_corners=False) for v in values])
    scores = torch.stack([F.interpolate(a, size, mode="bilinear", align_corners=False) for a in logits])
    share = torch.softmax(scores.to(acc), dim=0).to(values[0].dtype)  # [L, B, G, H, W]
    groups = share.shape[2]
    return (resampled.unflatten(2, (groups, -1)) * share.unsqueeze(3)).sum(0).flatten(1, 2)


def _resample(level: Tensor, size: tuple[int, int]) -> Tensor:
    level = level.to(accumulator(level.dtype))
    if tuple(level.shape[2:]) == tuple(size):
        return level
    return F.interpolate(level, size, mode="bilinear", align_corners=False)


def _resample_adjoint(grad: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(grad.shape[2:]) == tuple(size):
        return grad
    shape = (*grad.shape[:2], *size)
    return torch.ops.aten.upsample_bilinear2d_backward(grad, grad.shape[2:], shape, False, None, None)


def _grouped(level: Tensor, groups: int) -> Tensor:
    return level.unflatten(1, (groups, -1))  # [B, G, D/G, H, W]


def forward_pass(values: Sequence[Tensor], logits: Sequence[Tensor], out: Tensor) -> Tensor:
    """Writes P into out [B, D, H, W] and returns log Σ exp of the resampled logits [B, G, H, W].

    One level is resampled at a time, so memory holds two maps of P's size whatever the number of levels.
    """
    size, groups = out.shape[2:], logits[0].shape[1]
    scores = torch.stack([_resample(level, size) for level in logits])
    lse = torch.logsumexp(scores, dim=0)
    share = scores.sub_(lse).exp_()  # [L, B, G, H, W]
    total = None
    for level, weight in zip(values, share, strict=True):
        part = _resample(level, size)
        part = _grouped(part, groups) * weight.unsqueeze(2)
        total = part if total is None else total.add_(part)
    out.copy_(total.flatten(1, 2))
    return lse


def backward_pass(
    dp: Tensor,
    values: Sequence[Tensor],
    logits: Sequence[Tensor],
    lse: Tensor,
    d_values: Sequence[Tensor],
    d_logits: Sequence[Tensor],
) -> None:
    """Writes the gradients of every level into d_values and d_logits; the shares are recomputed from lse."""
    size, groups = dp.shape[2:], lse.shape[1]
    dp = _grouped(dp.to(lse.dtype), groups)
    share = torch.stack([_resample(level, size) for level in logits]).sub_(lse).exp_()
    d_share = torch.empty_like(share)
    for index, level in enumerate(values):
        d_share[index] = (_grouped(_resample(level, size), groups) * dp).sum(2)
        d_level = (dp * share[index].unsqueeze(2)).flatten(1, 2)
        d_values[index].copy_(_resample_adjoint(d_level, level.shape[2:]))
    d_score = share * (d_share - (share * d_share).sum(0))
    for index, level in enumerate(logits):
        d_logits[index].copy_(_resample_adjoint(d_score[index], level.shape[2:]))
