"""Padding of an image batch to a multiple, in one way for every network."""

import torch
import torch.nn.functional as F


def pad_to_multiple(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pad [B, C, H, W] at the bottom and right to multiples of `multiple`; the crop `[..., :H, :W]` undoes it.

    An axis is mirrored without repeating its edge (reflect); an axis too short to be mirrored that far repeats its last
    row or column instead, so images down to 1×1 pixel work. The dtype is kept. Padding is at one corner only, so that a
    feature cell at stride s covers the same pixels with and without it.
    """
    height, width = image.shape[-2:]
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height}×{width} px is empty: give at least 1×1 px")
    down, right = -height % multiple, -width % multiple
    if right:
        image = F.pad(image, (0, right, 0, 0), mode="reflect" if right < width else "replicate")
    if down:
        image = F.pad(image, (0, 0, 0, down), mode="reflect" if down < height else "replicate")
    return image
