"""Losses of restoration: a table of terms, each a mean, so that no crop size or batch changes its scale.

What papers train with: MIMO-UNet l1 + frequency; MPRNet charbonnier + 0.05 edge; Stripformer that and 0.0005 times a
contrast of VGG features of restored, sharp and blurry, which is not here (it needs VGG-19's weights and the blurry
image); NAFNet psnr; FFTformer l1 + frequency.

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
    of 256 px corresponds to 0.1·√(256·256) = 25.6 here (and FFTformer's too); of MIMO-UNet's outputs at a half and a
    quarter of the size, to a half and a quarter of that, where here all weigh the same. Mean over the full spectrum, of
    which half is computed.
    """
    width = restored.shape[-1]
    spectrum = torch.view_as_real(torch.fft.rfft2(restored - sharp, norm="ortho")).abs()
    twice = torch.full((spectrum.shape[-2],), 2.0, device=spectrum.device)  # columns that stand for two of the full one
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    return (spectrum.mean(dim=(0, 1, 2, 4)) * twice).sum() / width


def edge(restored: torch.Tensor, sharp: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """Return the mean of √(Δ² + eps²), Δ the Laplacian pyramid's finest level of restored − sharp in sRGB [0, 1].

    The edge term of MPRNet (Zamir et al., CVPR 2021) and of Stripformer, both with weight 0.05 beside charbonnier: an
    image less its reduction to half its size and back, both with Burt and Adelson's 5×5 kernel; edges are repeated
    outside of the image. The level is linear, so the images' difference has the difference of their levels.
    """
    difference = restored - sharp
    smooth = _smoothed(difference)
    reduced = torch.zeros_like(smooth)
    reduced[..., ::2, ::2] = 4 * smooth[..., ::2, ::2]
    return (difference - _smoothed(reduced)).square().add(eps**2).sqrt().mean()


def _smoothed(image: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] under (1, 5, 8, 5, 1)/20 along both axes."""
    channels = image.shape[1]
    kernel = image.new_tensor([1, 5, 8, 5, 1]).div(20).expand(channels, 1, 1, 5)
    image = F.conv2d(F.pad(image, (2, 2, 2, 2), mode="replicate"), kernel, groups=channels)
    return F.conv2d(image, kernel.transpose(2, 3), groups=channels)


def psnr(restored: torch.Tensor, sharp: torch.Tensor) -> torch.Tensor:
    """Return the NEGATIVE peak signal-to-noise ratio in dB, each sample's own, averaged over the batch.

    10·log₁₀ of a sample's mean squared difference in sRGB [0, 1], to which 1e-8 is added: a perfect restoration scores
    −80 dB. The loss of NAFNet (Chen et al., ECCV 2022): a sample's weight in the gradient is one over its own error, so
    the blurriest ones do not rule the batch.
    """
    return (restored - sharp).square().mean(dim=(1, 2, 3)).add(1e-8).log10().mean() * 10


# A term compares a restored image with the sharp one, both fp32 sRGB [B, 3, H, W]: a function here and a row make a new
# one, which `loss.pixel` and `loss.terms` then know.
TERMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "charbonnier": charbonnier,
    "l1": l1,
    "frequency": frequency_l1,
    "edge": edge,
    "psnr": psnr,
}


class RestorationLoss(nn.Module):
    """The weighted sum of the terms that a configuration names, each summed over the restored images.

    Parts: `pixel` (the term that loss.pixel names, of weight 1), and under their own names `frequency` and those of
    loss.terms; a weight of 0 leaves a term out. Every output has weight 1, as in MIMO-UNet and MPRNet. One smaller than
    the sharp image is compared with that image sampled bilinearly at its size (without antialiasing: the mean of the
    middle 2×2 pixels), as MIMO-UNet supervises its scales. forward(restored, sharp): restored = tuple of [B, 3, h, w],
    sharp [B, 3, H, W], sRGB in [0, 1]. ValueError for a name that is not in `TERMS`.
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
                target = sharp if size == sharp.shape[-2:] else F.interpolate(sharp, size=size, mode="bilinear")
                for name, (term, _) in self.terms.items():
                    parts[name] = parts[name] + term(image.float(), target)
            total = sum(weight * parts[name] for name, (_, weight) in self.terms.items())
        return total, {name: part.detach() for name, part in parts.items()}
