"""How much of a network's correction to believe, pixel by pixel, judged from the blurry image."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

STRIDE = 8  # of the gate's own features
WIDTH = 48


class CorrectionGate(nn.Module):
    """Scales a deblurrer's correction: restored + t ⊙ (restored − blurry), t [B, 1, H, W] in (−1, 1).

    t = −1 gives the blurry image back, t = 0 (a fresh gate, to the bit) the network's own result. The map comes from
    the blurry image through three strided convolutions to stride 8, joined by the prior's level of that stride where
    there is one, and is brought to the image's size bilinearly. A second head predicts log₂(1 + extent of the blur in
    px) from the mean of the same features: the stream knows that of every pair, so it can be learned (`loss.extent`).
    Our own; a network's trust in its correction, by what it sees.

    channels: of the prior's standardised level 2 (stride 8), 0 without a prior.
    """

    def __init__(self, channels: int = 0) -> None:
        super().__init__()
        widths = (3, WIDTH // 3, 2 * WIDTH // 3, WIDTH)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.join = nn.Conv2d(channels, WIDTH, 1) if channels else None
        self.mix = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.map, self.extent = nn.Conv2d(WIDTH, 1, 1), nn.Linear(WIDTH, 1)
        for head in (self.map, self.extent):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(
        self, blurry: torch.Tensor, restored: Sequence[torch.Tensor], level: torch.Tensor | None = None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """(gated restored images, predicted log₂(1 + extent) [B]). blurry [B, 3, H, W]; restored: those of H×W are
        gated, smaller outputs stay; level [B, channels, H/8, W/8]."""
        x = 4 * (blurry - 0.5)
        for convolution in self.down:
            x = F.gelu(convolution(x))
        if self.join is not None and level is not None:
            x = x + self.join(level)
        for convolution in self.mix:
            x = x + F.gelu(convolution(x))
        trust = F.interpolate(self.map(x).tanh(), size=blurry.shape[-2:], mode="bilinear", align_corners=False)
        gated = tuple(r + trust * (r - blurry) if r.shape[-2:] == blurry.shape[-2:] else r for r in restored)
        return gated, self.extent(x.mean(dim=(2, 3)))[:, 0]
