"""The frozen teacher: a network of another vision task; the prior learns to predict its features of the SHARP image."""

import contextlib
import hashlib
import json

import timm
import torch
import torch.nn.functional as F
from torch import nn

from model.encoder import EncoderSpec, build_encoder, weights_digest, without_weights
from model.names import choose
from model.networks import NETWORKS

FINGERPRINT_FORMAT = 3  # 2: before BatchNorms were folded, which changes features by their rounding
PRECISIONS = ("auto", "fp32", "bf16")


class Teacher(nn.Module):
    """A frozen timm classifier seen as level features; always eval, no parameter ever requires a gradient.

    name: `efficientnet_lite0` (its ImageNet weights are an installed package) or any timm network with features at
    strides 4, 8, …, or a plain vision transformer; weights: None or "pretrained", "random" (tests and studies only) or
    a file's path: `EncoderSpec`.
    precision: of the arithmetic, whatever autocast surrounds the call: fp32; bf16 (autocast, the weights stay fp32);
    auto: bf16 on a GPU that computes it, else fp32. Features are fp32 tensors in any case.
    Its BatchNorms are folded into its convolutions, where that is exact but for rounding (`model.folding`).
    compiled: run through torch.compile (once for each kind of input size); the first forward pass fails with ValueError
    where it has no compiler.
    Attributes: `channels` (c_1, …, c_L), `strides` (4, 8, …), `spec`.
    Raises ValueError where name, levels or weights do not fit.
    """

    def __init__(
        self,
        name: str = "efficientnet_lite0",
        weights: str | None = None,
        levels: int = 4,
        *,
        precision: str = "auto",
        compiled: bool = False,
    ) -> None:
        super().__init__()
        if without_weights(name):
            raise ValueError(f"{name} has learned nothing that it could teach: it can be a student only")
        self.spec = EncoderSpec(name, weights or "pretrained", levels)
        self._precision, self._compiled = choose("precision", precision, PRECISIONS), compiled
        self.encoder = build_encoder(self.spec)
        self.channels, self.strides = self.encoder.channels, self.encoder.strides
        self._digest: str | None = None
        self._tail: str | None = None
        self.requires_grad_(False)
        self.eval()
        self.encoder.fold()
        if compiled:
            self.encoder.compile()

    @property
    def precision(self) -> str:
        """The precision that a forward pass has where the weights are now: fp32 or bf16."""
        if self._precision != "auto":
            return self._precision
        if self.encoder.mean.device.type == "cpu" or not torch.cuda.is_bf16_supported(including_emulation=False):
            return "fp32"
        return "bf16"

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode, whatever is asked: a trainer's `.train()` on the whole must not wake the teacher."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return level features, without gradient: sRGB [B, 3, H, W] in [0, 1] → t_l [B, c_l, ⌈H/s_l⌉, ⌈W/s_l⌉]."""
        bf16 = self.precision == "bf16"
        with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16), self._explained():
            return tuple(feature.float() for feature in self.encoder(image))

    @contextlib.contextmanager
    def _explained(self):
        """A compiler's many lines become one."""
        try:
            yield
        except RuntimeError as error:
            # Dynamo's and Inductor's errors have no public common class; an eager network raises none of them.
            if not (self._compiled and type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))):
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(
                f"torch.compile of teacher {self.spec.name} failed ({reason}): set its compile to false"
            ) from error

    def logits(self, deepest: torch.Tensor) -> torch.Tensor:
        """Return class logits [B, K] from the deepest level's feature [B, c_L, h, w] through the frozen head.

        The gradient flows to `deepest`, so a predicted feature can be judged by the class it stands for.
        Raises ValueError if the teacher has no classifier behind its deepest level.
        """
        self.check_classifier()
        return self.encoder.net.forward_head(_TAILS[self._tail](self.encoder.net, deepest))

    def check_classifier(self) -> None:
        """Raise the ValueError of `logits` where there is no classifier behind the deepest level."""
        if self._tail is None:
            self._tail = self._find_tail()

    @torch.no_grad()
    def classify(self, image: torch.Tensor) -> torch.Tensor:
        """Return class probabilities [B, K] of sRGB images [B, 3, H, W] in [0, 1], as timm evaluates this network.

        The shorter side is resized (bicubic, antialiased) to input size / crop_pct and the centre is cropped.
        ValueError if it has no classifier.
        """
        cfg = self.encoder.net.pretrained_cfg
        side = cfg["input_size"][-1]
        height, width = image.shape[-2:]
        scale = round(side / cfg["crop_pct"]) / min(height, width)
        size = (max(side, round(height * scale)), max(side, round(width * scale)))
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        if self.encoder.net.num_classes < 1:
            raise ValueError(f"teacher {self.spec.name} has no classifier: its weights were trained without classes")
        return self.encoder.net(self.encoder.preprocess(image[..., top : top + side, left : left + side])).softmax(
            dim=1
        )

    def weights_digest(self) -> str:
        """Return a hex digest of the weights alone."""
        if self._digest is None:
            self._digest = weights_digest(self.encoder.net)
        return self._digest

    def fingerprint(self) -> str:
        """Return a hex digest of everything that decides the features: name, weights, timm, levels, preprocessing,
        and the precision at which they are computed on the device where the weights are now."""
        mean, std = self.encoder.mean_std
        facts = {
            "format": FINGERPRINT_FORMAT,
            "name": self.spec.timm_name,
            "weights": self.weights_digest(),
            "timm": None if self.spec.name in NETWORKS else timm.__version__,
            "strides": self.strides,
            "features": self.encoder.indices,
            "patch": self.encoder.patch,
            "mean": mean,
            "std": std,
            "padding": "reflect to the deepest stride, then to the patch",
            "precision": self.precision,
        }
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()

    @torch.no_grad()
    def _find_tail(self) -> str:
        """Find what timm's network does between its deepest feature and its head, by comparing on a probe image."""
        net, side = self.encoder.net, 2 * self.strides[-1]
        if self.encoder.patch is not None:
            raise ValueError(
                f"teacher {self.spec.name} gives its classes from all its tokens, which are no level's feature: set "
                "the weight of the class term (loss.logits) to 0"
            )
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
            "set the weight of the class term (loss.logits) to 0, or use all levels of a classification network"
        )


# What stands between the deepest feature (NCHW) and `forward_head` in timm's families; `_find_tail` proves the choice.
_TAILS = {
    "nothing": lambda net, x: x,
    "head convolution": lambda net, x: net.bn2(net.conv_head(x)),  # EfficientNet
    "final convolution": lambda net, x: net.final_conv(x),  # FastViT
    "channels-last norm": lambda net, x: net.norm(x.permute(0, 2, 3, 1)),  # Swin
    "channels-last": lambda net, x: x.permute(0, 2, 3, 1),  # MambaOut
}
