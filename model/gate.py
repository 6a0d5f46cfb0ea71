"""How much of a network's correction to believe, pixel by pixel, judged from the blurry image and the correction."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

STRIDE = 8  # of the gate's own features
WIDTH = 48
DILATIONS = (1, 2, 4)  # with which a place sees 127 px around it, beside the mean over the image
SCALES = 4  # of `energies`: 1, 2, 4 and 8 px


class CorrectionGate(nn.Module):
    """Scales a deblurrer's correction: restored + t ⊙ (restored − blurry), t [B, 1, H, W] in (−1, 1).

    t = −1 gives the blurry image back, t = 0 (a fresh gate, to the bit) the network's own result. The map comes from
    the blurry image and the correction, through three strided convolutions to stride 8 and through the energies of
    their gradients there; joined by the prior's level of that stride where there is one, of no effect at first; and is
    brought to the image's size by smoothed squares, nearly bilinearly. A second head predicts log₂(1 + extent of the
    blur in px) from the mean of the same features: the stream knows that of every pair, so it can be learned
    (`loss.extent`).

    No gradient goes from the gate to what it scales: the network learns to restore as if there were none, and the gate
    when to leave an image alone (only `optim.clip`, of all gradients together, joins them). A network that has to learn
    both at once learns the second first, and corrects severe blur half as much (docs/LOG.md). Our own; a network's
    trust in its correction, by what it sees.

    channels: of the prior's standardised level 2 (stride 8), 0 without a prior.
    """

    def __init__(self, channels: int = 0) -> None:
        super().__init__()
        widths = (6, WIDTH // 3, 2 * WIDTH // 3, WIDTH)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.measure = nn.Conv2d(8 * SCALES, WIDTH, 1)
        self.join = nn.Conv2d(channels, WIDTH, 1) if channels else None
        self.mix = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=d, dilation=d) for d in DILATIONS)
        self.whole = nn.Linear(WIDTH, WIDTH)
        for convolution in (*self.down, *self.mix):
            nn.init.kaiming_normal_(convolution.weight)
        self.map, self.extent = nn.Conv2d(WIDTH, 1, 1), nn.Linear(WIDTH, 1)
        for silent in (self.map, self.extent, *([self.join] if self.join is not None else [])):
            nn.init.zeros_(silent.weight)
            nn.init.zeros_(silent.bias)

    def forward(
        self, blurry: torch.Tensor, restored: torch.Tensor, level: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gated restored image, predicted log₂(1 + extent) [B]). blurry, restored [B, 3, H, W], of sides that are
        multiples of 8; level [B, channels, H/8, W/8]."""
        restored = restored.detach()
        correction = restored - blurry
        x = torch.cat([4 * (blurry - 0.5), 8 * correction], dim=1)  # each of about unit size
        for convolution in self.down:
            x = F.gelu(convolution(x))
        x = x + self.measure(torch.cat([energies(blurry), energies(correction)], dim=1))
        if self.join is not None and level is not None:
            x = x + self.join(level.detach())
        for convolution in self.mix:
            x = x + F.gelu(convolution(x))
        x = x + self.whole(F.gelu(x).mean(dim=(2, 3)))[..., None, None]
        # Smoothed squares: the gradient of torch's bilinear interpolation is not the same twice on a GPU.
        trust = F.interpolate(self.map(x).tanh(), scale_factor=STRIDE, mode="nearest")
        trust = F.avg_pool2d(trust, STRIDE + 1, stride=1, padding=STRIDE // 2, count_include_pad=False)
        return restored + trust * correction, self.extent(x.mean(dim=(2, 3)))[:, 0]


def energies(image: torch.Tensor) -> torch.Tensor:
    """Log of the mean squared differences along rows, columns and both diagonals, at four scales, about of unit size:
    [B, 3, H, W] → [B, 16, H/8, W/8]. Blur takes them away at the finest scales first, and along its direction."""
    grey, found = image.mean(dim=1, keepdim=True), []
    for scale in range(SCALES):
        if scale:
            grey = F.avg_pool2d(grey, 2)
        padded = F.pad(grey, (0, 1, 0, 1), mode="replicate")
        right, below, across = padded[..., :-1, 1:], padded[..., 1:, :-1], padded[..., 1:, 1:]
        squares = torch.cat([right - grey, below - grey, across - grey, right - below], dim=1).square()
        found.append(F.avg_pool2d(squares, STRIDE >> scale) if scale < 3 else squares)
    return (torch.cat(found, dim=1).add(1e-6).log10() + 4) / 1.5
