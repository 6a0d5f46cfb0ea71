"""What can be said of a picture without the sharp one."""

from __future__ import annotations

import torch
from skimage.measure import blur_effect
from torch import Tensor

SMALLEST = 5  # px: the filters leave nothing of less


def blur(restored: Tensor, sharp: Tensor) -> Tensor:
    """Perceived blur of uint8 RGB [B, 3, H, W] → float64 [B] on the CPU, by scikit-image: 0 none, 1 all.

    Crete et al. 2007: the share of the luma's gradients that a box filter of 11 px leaves, along rows or columns,
    whichever is more. `sharp` is not looked at, so that false edges count as sharpness: read it beside the others.
    ValueError below 5 px.
    """
    if min(restored.shape[-2:]) < SMALLEST:
        raise ValueError(f"blur of {tuple(restored.shape[-2:])} px: larger pictures than {SMALLEST - 1} px")
    pictures = restored.movedim(1, -1).cpu().numpy()
    return torch.tensor([float(blur_effect(picture, channel_axis=-1)) for picture in pictures], dtype=torch.float64)
