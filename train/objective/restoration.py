"""Losses of restoration and of cross-level feature learning, each a mean: no size or channel count changes its scale.

All arithmetic is fp32, also under autocast. A loss returns (total, parts): the scalar to differentiate, and its parts,
detached, by name, each before its weight.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

Parts = dict[str, torch.Tensor]


def charbonnier(restored: torch.Tensor, sharp: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """Return the mean of √(d² + eps²), d = restored − sharp in sRGB [0, 1], over all pixels and channels.

    A smooth L1 (Charbonnier et al., ICIP 1994); a perfect restoration scores eps.
    """
    return (restored - sharp).square().add(eps**2).sqrt().mean()


def l1(restored: torch.Tensor, sharp: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference in sRGB [0, 1] over all pixels and channels."""
    return (restored - sharp).abs().mean()


def frequency_l1(restored: torch.Tensor, sharp: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of the real and imaginary parts of the 2-D Fourier transforms.

    The multi-scale frequency term of MIMO-UNet (Cho et al., ICCV 2021), with the ORTHONORMAL transform: its size is
    that of the pixels' difference whatever the crop. The paper's transform is unnormalised, so its weight 0.1 on crops
    of 256 px corresponds to 0.1·√(256·256) = 25.6 here. Mean over the full spectrum, of which half is computed.
    """
    width = restored.shape[-1]
    spectrum = torch.view_as_real(torch.fft.rfft2(restored - sharp, norm="ortho")).abs()
    twice = torch.full((spectrum.shape[-2],), 2.0, device=spectrum.device)  # columns that stand for two of the full one
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    return (spectrum.mean(dim=(0, 1, 2, 4)) * twice).sum() / width


PIXEL_LOSSES = {"charbonnier": charbonnier, "l1": l1}


class RestorationLoss(nn.Module):
    """pixel + frequency · FFT-L1, averaged over the restored images; parts `pixel` and `frequency`.

    An output smaller than the sharp image is compared with its area-averaged reduction, as MIMO-UNet supervises its
    scales. forward(restored, sharp): restored = tuple of [B, 3, h, w], sharp [B, 3, H, W], sRGB in [0, 1].
    """

    def __init__(self, pixel: str = "charbonnier", frequency: float = 0.1) -> None:
        super().__init__()
        if pixel not in PIXEL_LOSSES:
            raise ValueError(f"unknown pixel loss '{pixel}': known: {', '.join(PIXEL_LOSSES)}")
        if frequency < 0:
            raise ValueError(f"the weight of the frequency loss is {frequency}: it cannot be negative")
        self.pixel, self.frequency = PIXEL_LOSSES[pixel], frequency

    def forward(self, restored: Sequence[torch.Tensor], sharp: torch.Tensor) -> tuple[torch.Tensor, Parts]:
        with torch.autocast(sharp.device.type, enabled=False):
            sharp = sharp.float()
            pixel = frequency = torch.zeros((), device=sharp.device)
            for image in restored:
                size = image.shape[-2:]
                target = sharp if size == sharp.shape[-2:] else F.interpolate(sharp, size=size, mode="area")
                pixel = pixel + self.pixel(image.float(), target) / len(restored)
                if self.frequency:
                    frequency = frequency + frequency_l1(image.float(), target) / len(restored)
            total = pixel + self.frequency * frequency
        parts = {"pixel": pixel.detach()} | ({"frequency": frequency.detach()} if self.frequency else {})
        return total, parts


def _cosine(r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(r, t, dim=1).mean()
