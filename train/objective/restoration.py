"""Losses of restoration: a table of terms, each a mean, so that no crop size or batch changes its scale.

All arithmetic is fp32, also under autocast. A loss returns (total, parts): the scalar to differentiate, and its parts,
detached, by name, each before its weight.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from model.names import choose
from train.config.schema import LossSection

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


# A term compares a restored image with the sharp one, both fp32 sRGB [B, 3, H, W]: a function here and a row make a new
# one, which `loss.pixel` and `loss.terms` then know.
TERMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "charbonnier": charbonnier,
    "l1": l1,
    "frequency": frequency_l1,
}


class RestorationLoss(nn.Module):
    """The weighted sum of the terms that a configuration names, each averaged over the restored images.

    Parts: `pixel` (the term that loss.pixel names, of weight 1), and under their own names `frequency` and those of
    loss.terms; a weight of 0 leaves a term out. An output smaller than the sharp image is compared with its
    area-averaged reduction, as MIMO-UNet supervises its scales. forward(restored, sharp): restored = tuple of
    [B, 3, h, w], sharp [B, 3, H, W], sRGB in [0, 1]. ValueError for a name that is not in `TERMS`.
    """

    def __init__(self, loss: LossSection) -> None:
        super().__init__()
        if "frequency" in loss.terms:
            raise ValueError("loss.terms: frequency has a key of its own, loss.frequency: set that")
        weights = {"frequency": loss.frequency, **loss.terms}
        chosen = {name: (TERMS[choose("term in loss.terms", name, TERMS)], w) for name, w in weights.items()}
        self.terms = {"pixel": (TERMS[choose("loss.pixel", loss.pixel, TERMS)], 1.0)}
        self.terms |= {name: term for name, term in chosen.items() if term[1]}

    def forward(self, restored: Sequence[torch.Tensor], sharp: torch.Tensor) -> tuple[torch.Tensor, Parts]:
        with torch.autocast(sharp.device.type, enabled=False):
            sharp = sharp.float()
            parts = dict.fromkeys(self.terms, sharp.new_zeros(()))
            for image in restored:
                size = image.shape[-2:]
                target = sharp if size == sharp.shape[-2:] else F.interpolate(sharp, size=size, mode="area")
                for name, (term, _) in self.terms.items():
                    parts[name] = parts[name] + term(image.float(), target) / len(restored)
            total = sum(weight * parts[name] for name, (_, weight) in self.terms.items())
        return total, {name: part.detach() for name, part in parts.items()}
