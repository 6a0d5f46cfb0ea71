"""MIMO-UNet and MIMO-UNet+ (Cho et al., "Rethinking Coarse-to-Fine Approach in Single Image Deblurring", ICCV 2021)."""

import torch
import torch.nn.functional as F
from torch import nn

from model.backbones.points import Embed, identity

WIDTHS = (32, 64, 128)  # of the three levels, at strides 1, 2 and 4


class BasicConv(nn.Module):
    """A convolution with bias, or a transposed one that doubles the size, and a ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, relu: bool = True, up: bool = False):
        super().__init__()
        padding = size // 2 - up
        kind = nn.ConvTranspose2d if up else nn.Conv2d
        layers: list[nn.Module] = [kind(inputs, outputs, size, stride=stride, padding=padding)]
        self.main = nn.Sequential(*layers, *([nn.ReLU()] if relu else []))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x)


class ResBlock(nn.Module):
    """x + conv(ReLU(conv(x))), [B, C, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(BasicConv(channels, channels, 3), BasicConv(channels, channels, 3, relu=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x) + x


class Blocks(nn.Module):
    """`num_res` residual blocks: the paper's encoder block (EB) and decoder block (DB)."""

    recompute = False  # engine.checkpointing: not as one, but its residual blocks each

    def __init__(self, channels: int, num_res: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(ResBlock(channels) for _ in range(num_res)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class SCM(nn.Module):
    """Shallow convolutional module: features [B, C, h, w] of a reduced image [B, 3, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            BasicConv(3, channels // 4, 3),
            BasicConv(channels // 4, channels // 2, 1),
            BasicConv(channels // 2, channels // 2, 3),
            BasicConv(channels // 2, channels - 3, 1),
        )
        self.conv = BasicConv(channels, channels, 1, relu=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat([image, self.main(image)], dim=1))


class FAM(nn.Module):
    """Feature attention module: lets a reduced image's features stress or suppress those of the level above."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.merge = BasicConv(channels, channels, 3, relu=False)

    def forward(self, feature: torch.Tensor, image_feature: torch.Tensor) -> torch.Tensor:
        return feature + self.merge(feature * image_feature)


class AFF(nn.Module):
    """Asymmetric feature fusion: the encoder's features of all levels, brought to one size, become one level's skip."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(BasicConv(inputs, outputs, 1), BasicConv(outputs, outputs, 3, relu=False))

    def forward(self, *levels: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat(levels, dim=1))


class MIMOUNet(nn.Module):
    """Blurry [B, 3, H, W] → restored at a quarter, a half and the full size, in this order, which is the official one.

    sRGB, nominally in [0, 1]; H, W multiples of 4. Multi-input: the encoder reads the image at three sizes (every 2nd
    and 4th pixel); multi-output: each decoder level adds a correction to its own. num_res: residual blocks of each of
    the six encoder and decoder blocks, 8 in MIMO-UNet (6.8 M parameters), 20 in MIMO-UNet+ (16.1 M).

    Embed points: `bottleneck` (128 channels, stride 4), the deepest encoder level's output, which the first decoder
    block and both skips (AFF) read; `decoder2` (64, 2), before the second decoder block. State-dict names are the
    official release's.
    """

    def __init__(self, num_res: int = 8) -> None:
        super().__init__()
        if num_res < 1:
            raise ValueError(f"MIMO-UNet needs num_res ≥ 1, got {num_res}")
        one, two, four = WIDTHS
        self.Encoder = nn.ModuleList(Blocks(width, num_res) for width in (one, two, four))
        self.feat_extract = nn.ModuleList(
            [
                BasicConv(3, one, 3),
                BasicConv(one, two, 3, stride=2),
                BasicConv(two, four, 3, stride=2),
                BasicConv(four, two, 4, stride=2, up=True),
                BasicConv(two, one, 4, stride=2, up=True),
                BasicConv(one, 3, 3, relu=False),
            ]
        )
        self.Decoder = nn.ModuleList(Blocks(width, num_res) for width in (four, two, one))
        self.Convs = nn.ModuleList([BasicConv(four, two, 1), BasicConv(two, one, 1)])
        self.ConvsOut = nn.ModuleList([BasicConv(four, 3, 3, relu=False), BasicConv(two, 3, 3, relu=False)])
        self.AFFs = nn.ModuleList([AFF(sum(WIDTHS), one), AFF(sum(WIDTHS), two)])
        self.FAM1, self.SCM1 = FAM(four), SCM(four)
        self.FAM2, self.SCM2 = FAM(two), SCM(two)
        self.stride_multiple = 4
        self.embed_points = {"bottleneck": (four, 4), "decoder2": (two, 2)}

    def forward(self, x: torch.Tensor, embed: Embed = identity) -> tuple[torch.Tensor, ...]:
        half, quarter = x[..., ::2, ::2], x[..., ::4, ::4]
        enter, down2, down4, up2, up1, leave = self.feat_extract

        level1 = self.Encoder[0](enter(x))  # [B, 32, H, W]
        level2 = self.Encoder[1](self.FAM2(down2(level1), self.SCM2(half)))  # [B, 64, H/2, W/2]
        level4 = self.Encoder[2](self.FAM1(down4(level2), self.SCM1(quarter)))  # [B, 128, H/4, W/4]
        level4 = embed("bottleneck", level4)

        four_at_two = _twice(level4)
        skip2 = self.AFFs[1](level1[..., ::2, ::2], level2, four_at_two)
        skip1 = self.AFFs[0](level1, _twice(level2), _twice(four_at_two))

        feature = self.Decoder[0](level4)
        restored4 = quarter + self.ConvsOut[0](feature)
        feature = self.Convs[0](torch.cat([up2(feature), skip2], dim=1))
        feature = self.Decoder[1](embed("decoder2", feature))
        restored2 = half + self.ConvsOut[1](feature)
        feature = self.Convs[1](torch.cat([up1(feature), skip1], dim=1))
        return restored4, restored2, x + leave(self.Decoder[2](feature))


def _twice(feature: torch.Tensor) -> torch.Tensor:
    """Every position four times: [B, C, h, w] → [B, C, 2h, 2w]."""
    return F.interpolate(feature, scale_factor=2.0, mode="nearest")
