"""The backbones: networks that restore, and that let a prior in at the points they declare.

A backbone has `embed_points` {name: (channels, stride)}, `stride_multiple` (its input's height and width are multiples
of it) and `forward(x [B, 3, H, W], embed)` → tuple of restored images, the full-size one last.
"""

from model.backbones.unet import UNet

BACKBONES = {"unet": UNet}

__all__ = ["BACKBONES", "UNet"]
