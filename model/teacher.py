"""The frozen teacher: a network of another vision task; the prior learns to predict its features of the SHARP image."""

import hashlib
import json

import timm
import torch
import torch.nn.functional as F
from torch import nn

from model.encoder import EncoderSpec, build_encoder, weights_digest

FINGERPRINT_FORMAT = 1


class Teacher(nn.Module):
    """A frozen timm classifier seen as level features; always eval, no parameter ever requires a gradient.

    name: `efficientnet_lite0` (its ImageNet weights are an installed package) or any timm network with features at
    strides 4, 8, …; weights: None or "pretrained", "random" (tests and studies only) or a file's path: `EncoderSpec`.
    Attributes: `channels` (c_1, …, c_L), `strides` (4, 8, …), `spec`.
    Raises ValueError where name, levels or weights do not fit.
    """

    def __init__(self, name: str = "efficientnet_lite0", weights: str | None = None, levels: int = 4) -> None:
        super().__init__()
        self.spec = EncoderSpec(name, weights or "pretrained", levels)
        self.encoder = build_encoder(self.spec)
        self.channels, self.strides = self.encoder.channels, self.encoder.strides
        self._fingerprint: str | None = None
        self._tail: str | None = None
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode, whatever is asked: a trainer's `.train()` on the whole must not wake the teacher."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return level features, without gradient: sRGB [B, 3, H, W] in [0, 1] → t_l [B, c_l, ⌈H/s_l⌉, ⌈W/s_l⌉]."""
        return self.encoder(image)

    def logits(self, deepest: torch.Tensor) -> torch.Tensor:
        """Return class logits [B, K] from the deepest level's feature [B, c_L, h, w] through the frozen head.

        The gradient flows to `deepest`, so a predicted feature can be judged by the class it stands for.
        Raises ValueError if the teacher has no classifier behind its deepest level.
        """
        if self._tail is None:
            self._tail = self._find_tail()
        return self.encoder.net.forward_head(_TAILS[self._tail](self.encoder.net, deepest))

    @torch.no_grad()
    def classify(self, image: torch.Tensor) -> torch.Tensor:
        """Return class probabilities [B, K] of sRGB images [B, 3, H, W] in [0, 1], as timm evaluates this network.

        The shorter side is resized (bicubic, antialiased) to input size / crop_pct and the centre is cropped.
        """
        cfg = self.encoder.net.pretrained_cfg
        side = cfg["input_size"][-1]
        height, width = image.shape[-2:]
        scale = round(side / cfg["crop_pct"]) / min(height, width)
        size = (max(side, round(height * scale)), max(side, round(width * scale)))
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        return self.logits(self(image[..., top : top + side, left : left + side])[-1]).float().softmax(dim=1)

    def fingerprint(self) -> str:
        """Return a hex digest of everything that decides the features: name, weights, timm, levels, preprocessing."""
        if self._fingerprint is None:
            mean, std = self.encoder.mean_std
            facts = {
                "format": FINGERPRINT_FORMAT,
                "name": self.spec.timm_name,
                "weights": weights_digest(self.encoder.net),
                "timm": timm.__version__,
                "strides": self.strides,
                "mean": mean,
                "std": std,
                "padding": "reflect to the deepest stride",
            }
            digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @torch.no_grad()
    def _find_tail(self) -> str:
        """Find what timm's network does between its deepest feature and its head, by comparing on a probe image."""
        net, side = self.encoder.net, 2 * self.strides[-1]
        probe = torch.linspace(-1, 1, 3 * side * side, device=self.encoder.mean.device).view(1, 3, side, side)
        final, features = net.forward_intermediates(probe, output_fmt="NCHW")
        if features[-1].shape[1] == self.channels[-1] and net.num_classes > 0:
            for name, tail in _TAILS.items():
                try:
                    candidate = tail(net, features[-1])
                except (AttributeError, RuntimeError):
                    continue
                if candidate.shape == final.shape and torch.allclose(candidate, final, rtol=1e-4, atol=1e-5):
                    return name
        raise ValueError(
            f"teacher {self.spec.name} with {self.spec.levels} levels has no classifier behind its deepest level: "
            "set the weight of the class term to 0, or use all levels of a classification network"
        )


# What stands between the deepest feature (NCHW) and `forward_head` in timm's families; `_find_tail` proves the choice.
_TAILS = {
    "nothing": lambda net, x: x,
    "head convolution": lambda net, x: net.bn2(net.conv_head(x)),  # EfficientNet
    "final convolution": lambda net, x: net.final_conv(x),  # FastViT
    "channels-last norm": lambda net, x: net.norm(x.permute(0, 2, 3, 1)),  # Swin
    "channels-last": lambda net, x: x.permute(0, 2, 3, 1),  # MambaOut
}
