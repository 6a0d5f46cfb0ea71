"""NAFNet: a UNet of blocks without any nonlinear activation but products (Chen et al., ECCV 2022, arXiv 2204.04676)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.backbones.layers import LayerNorm2d, depthwise
from model.backbones.points import Embed, identity


class NAFBlock(nn.Module):
    """[B, C, h, w] → the same: a depthwise branch with channel attention, then a feed-forward branch; both gated.

    A fresh block is the identity: beta and gamma, which weigh the branches, start at zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.conv1 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv2 = depthwise(2 * channels)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1))
        self.conv4 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.norm1 = LayerNorm2d(channels)
        self.norm2 = LayerNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = simple_gate(self.conv2(self.conv1(self.norm1(x))))
        y = self.conv3(y * self.sca(y))
        x = x + y * self.beta
        y = self.conv5(simple_gate(self.conv4(self.norm2(x))))
        return x + y * self.gamma


def simple_gate(x: Tensor) -> Tensor:
    """[B, 2C, h, w] → [B, C, h, w]: the product of the two halves of the channels."""
    first, second = x.chunk(2, dim=1)
    return first * second


class NAFNet(nn.Module):
    """Blurry [B, 3, H, W] → (restored [B, 3, H, W],), sRGB, nominally in [0, 1]; H, W multiples of `stride_multiple`.

    Level l = 1..L (L = len(enc_blk_nums)) has stride 2^(l-1) and width·2^(l-1) channels, the bottleneck 2^L and
    width·2^L. The defaults are NAFNet-32 for GoPro. Keys and shapes of the state dict are those of the official
    release, which pads the image with zeros where `Deblurrer` mirrors it: near the lower and right border of an image
    whose sides are no multiples, results differ from the release's.
    `embed_points` {name: (channels, stride)}: `bottleneck` and every decoder level but the first; `embed(name,
    feature)` is called there, before the level's blocks. ValueError for counts that make no network.
    """

    def __init__(
        self,
        width: int = 32,
        enc_blk_nums: Sequence[int] = (1, 1, 1, 28),
        middle_blk_num: int = 1,
        dec_blk_nums: Sequence[int] = (1, 1, 1, 1),
    ) -> None:
        super().__init__()
        depth = len(enc_blk_nums)
        if (
            width < 1
            or depth < 1
            or len(dec_blk_nums) != depth
            or min(*enc_blk_nums, *dec_blk_nums, middle_blk_num) < 0
        ):
            raise ValueError(
                "a NAFNet needs width ≥ 1 and as many decoder as encoder levels, one or more, of ≥ 0 blocks each, got "
                f"width {width}, enc_blk_nums {list(enc_blk_nums)}, middle_blk_num {middle_blk_num}, "
                f"dec_blk_nums {list(dec_blk_nums)}"
            )
        widths = [width * 2**level for level in range(depth + 1)]
        self.stride_multiple = 2**depth
        self.intro = nn.Conv2d(3, width, 3, padding=1)
        self.ending = nn.Conv2d(width, 3, 3, padding=1)
        self.encoders = nn.ModuleList(_stack(w, n) for w, n in zip(widths[:-1], enc_blk_nums, strict=True))
        # The decoder's lists begin at the deepest level.
        self.decoders = nn.ModuleList(_stack(w, n) for w, n in zip(widths[-2::-1], dec_blk_nums, strict=True))
        self.middle_blks = _stack(widths[-1], middle_blk_num)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(w, 2 * w, 1, bias=False), nn.PixelShuffle(2)) for w in widths[:0:-1]
        )
        self.downs = nn.ModuleList(nn.Conv2d(w, 2 * w, 2, stride=2) for w in widths[:-1])
        self.embed_points = {"bottleneck": (widths[-1], 2**depth)} | {
            f"decoder{level + 1}": (widths[level], 2**level) for level in range(depth - 1, 0, -1)
        }

    def forward(self, x: Tensor, embed: Embed = identity) -> tuple[Tensor, ...]:
        feature = self.intro(x)
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            feature = encoder(feature)
            skips.append(feature)
            feature = down(feature)
        feature = self.middle_blks(embed("bottleneck", feature))
        for decoder, up, level in zip(self.decoders, self.ups, range(len(skips), 0, -1), strict=True):
            feature = up(feature) + skips[level - 1]
            if level > 1:
                feature = embed(f"decoder{level}", feature)
            feature = decoder(feature)
        return (self.ending(feature) + x,)


def _stack(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(NAFBlock(channels) for _ in range(count)))
