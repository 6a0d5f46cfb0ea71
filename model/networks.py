"""Encoders outside timm: a row each, usable as student, and as teacher where there are weights to read.

An encoder speaks the part of timm's interface that `model.encoder.Encoder` uses: `pretrained_cfg` with mean and std (of
sRGB in [0, 1]; a classifier's also input_size and crop_pct), `feature_info`, a list of {num_chs, reduction} a level,
`forward_intermediates(x, indices=…)` → features [B, c_l, h_l, w_l], and `prune_intermediate_layers(indices, …)`. For
class terms it also has `num_classes`, `forward_head` and `forward`, as timm's classifiers do.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from model.light import LightNet


class Network(NamedTuple):
    """How to make an encoder (its first weights come from the ambient generator, which is seeded), and how to put its
    published weights into it; None: it has none and starts from the seed."""

    make: Callable[[], nn.Module]
    read: Callable[[nn.Module], None] | None = None


NETWORKS = {"light": Network(LightNet)}
