"""A compact residual UNet for severe blur: plain 3×3 residual blocks, no normalisation, most of its depth far down."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from model.backbones.points import Embed, identity

INPUT_SCALE = 4.0  # photographs in [0, 1] deviate from their mean by about 1/4: features start at about unit size


def convolution(inputs: int, outputs: int, size: int, stride: int = 1, gain: float = 1.0) -> nn.Conv2d:
    """Return a convolution without bias that multiplies the standard deviation of a random input by `gain`."""
    conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=(size - 1) // 2, bias=False)
    nn.init.normal_(conv.weight, std=gain * (inputs * size**2) ** -0.5)
    return conv


class ResidualBlock(nn.Module):
    """x + conv3×3(GELU(conv3×3(x))), [B, C, h, w], without biases; the correction starts at about half of x's size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = convolution(channels, channels, 3, gain=2**0.5)
        self.second = convolution(channels, channels, 3, gain=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.gelu(self.first(x)))


class UNet(nn.Module):
    """Blurry [B, 3, H, W] → (restored [B, 3, H, W],), sRGB, nominally in [0, 1]; H, W multiples of `stride_multiple`.

    The image enters by pixel-unshuffle (`patch`), goes down by strided convolutions and up by pixel-shuffle with added
    skips, and leaves by pixel-shuffle as a correction to the input: a fresh network is the exact identity. Level
    l = 1..L has stride patch·2^(l-1) and width·2^(l-1) channels; `blocks` counts its residual blocks, on the way down
    and again on the way up (the deepest level, the bottleneck, has them once).

    No convolution has a bias, and the image's mean colour is taken off before it enters (and is no part of the
    correction): blur keeps means, so a constant image comes back exactly, and the network cannot learn a tint from a
    few photographs that harms every other one. Bias-free networks: Mohan et al., ICLR 2020, for denoising.

    Receptive field, without the mean colour, which sees every pixel: 268 px with the defaults, which covers a motion of
    130 px to either side.
    `embed_points` {name: (channels, stride)}: `bottleneck` and every decoder level but the first; `embed(name,
    feature)` is called there, before the level's blocks.
    """

    def __init__(self, width: int = 32, blocks: Sequence[int] = (1, 1, 1, 2), patch: int = 2) -> None:
        super().__init__()
        if width < 1 or len(blocks) < 2 or min(blocks) < 0 or patch < 1:
            raise ValueError(
                f"a UNet needs width ≥ 1, two or more levels of ≥ 0 blocks and patch ≥ 1, "
                f"got width {width}, blocks {list(blocks)}, patch {patch}"
            )
        depth = len(blocks)
        self.patch = patch
        widths = [width * 2**level for level in range(depth)]
        strides = [patch * 2**level for level in range(depth)]
        self.stride_multiple = strides[-1]
        self.enter = convolution(3 * patch**2, width, 3)
        self.encoder = nn.ModuleList(_stack(w, n) for w, n in zip(widths[:-1], blocks, strict=False))
        self.down = nn.ModuleList(convolution(w, 2 * w, 2, stride=2) for w in widths[:-1])
        self.bottleneck = _stack(widths[-1], blocks[-1])
        self.up = nn.ModuleList(convolution(2 * w, 4 * w, 1) for w in widths[:-1])
        self.decoder = nn.ModuleList(_stack(w, n) for w, n in zip(widths[:-1], blocks, strict=False))
        self.leave = convolution(width, 3 * patch**2, 3, gain=0.0)
        self.embed_points = {
            f"decoder{level + 1}": (widths[level], strides[level]) for level in range(1, depth - 1)
        } | {"bottleneck": (widths[-1], strides[-1])}

    def forward(self, x: torch.Tensor, embed: Embed = identity) -> tuple[torch.Tensor, ...]:
        centred = (x - x.mean(dim=(2, 3), keepdim=True)) * INPUT_SCALE
        feature = self.enter(F.pixel_unshuffle(centred, self.patch))
        skips = []
        for blocks, down in zip(self.encoder, self.down, strict=True):
            feature = blocks(feature)
            skips.append(feature)
            feature = down(feature)
        feature = self.bottleneck(embed("bottleneck", feature))
        for level in reversed(range(len(skips))):
            feature = F.pixel_shuffle(self.up[level](feature), 2) + skips[level]
            if level > 0:
                feature = embed(f"decoder{level + 1}", feature)
            feature = self.decoder[level](feature)
        return (x + F.pixel_shuffle(self.leave(feature), self.patch),)


def _stack(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(channels) for _ in range(count)))
