"""Layers that several of the published deblurring networks have in common."""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LayerNorm2d(nn.Module):
    """Normalise the channels of every pixel: [B, C, H, W] → the same shape, dtype and memory format.

    x̂ = (x − mean) / √(variance + eps) over C (variance divided by C), times weight [C], plus bias [C]; statistics are
    fp32 whatever the dtype of x. The backward pass keeps x and two numbers a pixel; written out in autograd's own
    operations it keeps three maps of x's size, which was most of NAFNet's memory. Differentiable once where x is not
    channels last.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        # Two ways, by the numbers (one CPU core, [4, 32, 128, 128], forward + backward): channels last 6 ms by
        # layer_norm against 15 ms; planes 15 ms by the function against 32 ms, as layer_norm has to turn them around.
        if channels_last(x):
            pixels = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
            return pixels.permute(0, 3, 1, 2).to(x.dtype)
        return _NormalisePlanes.apply(x, self.weight, self.bias, self.eps)


class _NormalisePlanes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        mean = wide.mean(1, keepdim=True)
        centred = wide - mean
        scale = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, mean, scale, weight)
        return torch.addcmul(bias.view(1, -1, 1, 1), centred * scale, weight.view(1, -1, 1, 1)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, weight = ctx.saved_tensors
        normal = (x - mean) * scale
        inner = grad * weight.view(1, -1, 1, 1)
        dx = scale * (inner - inner.mean(1, keepdim=True) - normal * (inner * normal).mean(1, keepdim=True))
        return dx.to(x.dtype), (grad * normal).sum((0, 2, 3)), grad.sum((0, 2, 3), dtype=weight.dtype), None


def channels_last(x: Tensor) -> bool:
    """Whether [B, C, H, W] lies in memory as [B, H, W, C], and not (also) as it is written."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def body_norm(channels: int) -> nn.Sequential:
    """Return the layer norm of Restormer and FFTformer (eps 1e-5), whose parameters are called `body.weight/bias`."""
    return nn.Sequential(OrderedDict(body=LayerNorm2d(channels, eps=1e-5)))


class OverlapPatchEmbed(nn.Module):
    """Image [B, 3, H, W] → features [B, channels, H, W] by one 3×3 convolution without bias (Restormer, FFTformer)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def depthwise(channels: int, bias: bool = True) -> nn.Conv2d:
    """Return a 3×3 convolution of each channel on its own, zero-padded."""
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias)
