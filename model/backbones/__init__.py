"""The backbones: networks that restore, and that let a prior in at the points they declare. One file and one row each.

A backbone is an nn.Module, made from plain settings that all have defaults, with
  embed_points      {name: (channels, stride)}: the features that it hands to `embed`, each once in a forward pass, and
                    goes on with what comes back, of the same shape
  stride_multiple   its input's height and width are multiples of it; `Deblurrer` pads
  forward(x, embed) x [B, 3, H, W] sRGB, nominally in [0, 1]; embed(name, feature [B, channels, H/stride, W/stride]),
                    `identity` by default → tuple of restored images, the full-size one [B, 3, H, W] last
Nothing in it depends on the batch: no statistics over samples. tests/model/test_backbones.py holds the rows to this.
"""

from model.backbones.fftformer import FFTformer
from model.backbones.mimounet import MIMOUNet
from model.backbones.mprnet import MPRNet
from model.backbones.nafnet import NAFNet
from model.backbones.restormer import Restormer
from model.backbones.stripformer import Stripformer
from model.backbones.uformer import Uformer
from model.backbones.unet import UNet

BACKBONES = {
    "fftformer": FFTformer,
    "mimounet": MIMOUNet,
    "mprnet": MPRNet,
    "nafnet": NAFNet,
    "restormer": Restormer,
    "stripformer": Stripformer,
    "uformer": Uformer,
    "unet": UNet,
}

# Sizes of the papers under names of their own, in the form of a configuration's `model.backbone`; what is set beside
# the name goes before. Where a paper has one size, it is the class's defaults.
PRESETS = {
    "nafnet-32": {"name": "nafnet", "width": 32},
    "nafnet-64": {"name": "nafnet", "width": 64},
    "uformer-t": {"name": "uformer", "embed_dim": 16, "depths": [2] * 9},
    "uformer-s": {"name": "uformer", "embed_dim": 32, "depths": [2] * 9},
    "uformer-b": {"name": "uformer", "embed_dim": 32, "depths": [1, 2, 8, 8, 2, 8, 8, 2, 1]},
    "mimo-unet": {"name": "mimounet", "num_res": 8},
    "mimo-unet-plus": {"name": "mimounet", "num_res": 20},
}
