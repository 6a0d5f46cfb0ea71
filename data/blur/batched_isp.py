"""A phone's processing (`data.blur.isp`) of batches of pictures, by the same filters in PyTorch."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.blur import isp
from data.blur.photometry import Photometry


def develop_batch(light: Tensor, photometry: Sequence[Photometry]) -> Tensor:
    """Demosaicked and denoised light [B, S, S, 3] float32 of noisy light."""
    planes = light.permute(0, 3, 1, 2)
    masks = torch.from_numpy(isp.mosaic_masks(light.shape[1])).to(light.device)
    kernels = torch.from_numpy(np.stack([isp.COLOUR, isp.GREEN, isp.COLOUR])[:, None]).to(light.device)
    colour = F.conv2d(F.pad(planes * masks, (1, 1, 1, 1), mode="reflect"), kernels, groups=3)
    red, green, blue = colour.unbind(1)
    luma = isp.LUMA[0] * red + isp.LUMA[1] * green + isp.LUMA[2] * blue
    denoise, shot, read = (
        torch.tensor([float(value) for value in values], device=light.device)[:, None, None]
        for values in zip(*((p.denoise or 0.0, p.shot, p.read) for p in photometry), strict=True)
    )
    base = _smooth(luma, isp.SMALL)
    detail = luma - base
    variance = denoise**2 * (shot * base.clamp_min(0) + read**2)
    kept = base + detail**3 / (detail**2 + variance).clamp_min(1e-12)
    share = denoise.clamp_max(1.0)
    red, blue = (kept + (1 - share) * (p - luma) + share * _smooth(p - luma, isp.WIDE) for p in (red, blue))
    filtered = torch.stack([red, (kept - isp.LUMA[0] * red - isp.LUMA[2] * blue) / isp.LUMA[1], blue], dim=1)
    return torch.where((denoise > 0)[:, None], filtered, colour).permute(0, 2, 3, 1)


def sharpen_batch(values: Tensor, photometry: Sequence[Photometry]) -> Tensor:
    """Display values [B, S, S, 3] float32 with each sample's sharpening halo."""
    planes = values.permute(0, 3, 1, 2)
    blurred = torch.stack(
        [_smooth(some, isp.gaussian(p.halo, isp.HALO_REACH)) for some, p in zip(planes, photometry, strict=True)]
    )
    amount = torch.tensor([p.sharpen for p in photometry], device=values.device)[:, None, None, None]
    return (planes + amount * (planes - blurred)).permute(0, 2, 3, 1)


def _smooth(planes: Tensor, weights: np.ndarray) -> Tensor:
    """Planes [N, S, S] filtered along both sides, mirrored at the edges."""
    reach, row = len(weights) // 2, torch.from_numpy(weights).to(planes.device)
    padded = F.pad(planes[:, None], (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, row[None, None, None, :]), row[None, None, :, None])[:, 0]
