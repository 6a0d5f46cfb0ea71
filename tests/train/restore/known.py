"""Networks whose results are known."""

import torch
from torch import nn

from model.deblurrer import Deblurred


class Known(nn.Module):
    """The image plus `shift`, optionally smoothed by a k×k box."""

    def __init__(self, shift: float = 0.0, box: int = 1, multiple: int = 1) -> None:
        super().__init__()
        self.shift, self.box, self.multiple = nn.Parameter(torch.tensor(shift)), box, multiple
        self.sizes: list[tuple[int, int]] = []

    def forward(self, image):
        self.sizes.append(tuple(image.shape[-2:]))
        padded = nn.functional.pad(image, [self.box // 2] * 4, mode="replicate")
        return Deblurred((nn.functional.avg_pool2d(padded, self.box, 1) + self.shift,), None)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
