"""The light student: a small convolutional encoder for cheap inference, trained from scratch by distillation."""

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import nn

WIDTHS = (32, 64, 112, 192)
BLOCKS = (1, 2, 3, 2)
EXPANSION = 3
KERNEL = 5


class Block(nn.Module):
    """Depthwise k×k, then a pixel-wise two-layer network, added to the input: [B, C, h, w] → the same shape.

    The arrangement of ConvNeXt (Liu et al., CVPR 2022) with a smaller kernel and expansion. The norm is over channels,
    pixel by pixel: nothing depends on batch or crop size.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.norm = LayerNorm2d(width)
        self.enter = nn.Conv2d(width, EXPANSION * width, 1)
        self.leave = nn.Conv2d(EXPANSION * width, width, 1)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.leave(self.act(self.enter(self.norm(self.depthwise(x)))))


class LightNet(nn.Module):
    """Features at strides 4, 8, 16, 32 with 32, 64, 112, 192 channels; under 1 M parameters. Our design.

    It speaks the part of timm's interface that `Encoder` uses. Initial weights come from the ambient generator.
    """

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**level, "module": f"stages.{level}"}
            for level, width in enumerate(WIDTHS)
        ]
        # Rearranging 4×4 px to channels keeps the full resolution, the costliest place, free of arithmetic.
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, WIDTHS[0], 3, padding=1), LayerNorm2d(WIDTHS[0]))
        self.stages = nn.ModuleList()
        for level, (width, count) in enumerate(zip(WIDTHS, BLOCKS, strict=True)):
            down = [] if level == 0 else [LayerNorm2d(WIDTHS[level - 1]), nn.Conv2d(WIDTHS[level - 1], width, 2, 2)]
            self.stages.append(nn.Sequential(*down, *(Block(width) for _ in range(count))))

    def forward_intermediates(
        self, x: torch.Tensor, indices: Sequence[int] | None = None, **_: object
    ) -> list[torch.Tensor]:
        """Return the asked stages' features; x [B, 3, H, W], H and W multiples of the deepest asked stride."""
        wanted = list(range(len(self.stages))) if indices is None else list(indices)
        features = []
        x = self.stem(x)
        for level, stage in enumerate(self.stages[: max(wanted) + 1]):
            x = stage(x)
            if level in wanted:
                features.append(x)
        return features

    def prune_intermediate_layers(self, indices: Sequence[int], **_: object) -> None:
        """Drop the stages behind the last asked one."""
        self.stages = self.stages[: max(indices) + 1]
