"""The deblurrer: a restoration backbone, the prior network, and one semantic prior embedding per embed point."""

import inspect
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from model.backbones import BACKBONES, PRESETS
from model.config import ModelConfig, SpeConfig
from model.encoder import EncoderSpec, build_encoder, level_channels, teacher_specs
from model.gate import STRIDE, CorrectionGate
from model.names import choose, unknown_name
from model.padding import pad_to_multiple
from model.prior import PriorNetwork
from model.spe import SemanticPriorEmbedding
from model.statistics import FeatureStatistics


class Deblurred(NamedTuple):
    """What a deblurrer gives: restored images, the full-size one last; the prior's levels r_l; the student's own
    features s_l where they can be compared with the first teacher's. None without a prior. extent: what a gate takes
    for log₂(1 + the blur's extent in px) [B]; own: the full-size image that it was given, the network's own. None
    without a gate."""

    restored: tuple[torch.Tensor, ...]
    prior: tuple[torch.Tensor, ...] | None
    student: tuple[torch.Tensor, ...] | None = None
    extent: torch.Tensor | None = None
    own: torch.Tensor | None = None


class Deblurrer(nn.Module):
    """Blurry [B, 3, H, W] in [0, 1], sRGB, of any size → `Deblurred`. One module holds everything that is trained.

    The prior's levels r_l are [B, c_l, ⌈H/s_l⌉, ⌈W/s_l⌉], the shapes of the teacher's features of the sharp image; a
    restored image smaller than H×W (a backbone with several outputs) is cropped in proportion. Restored values are not
    clamped. The image is padded at the bottom and right to `multiple` and cropped after.

    spe: the embeddings' sizes, and which of the backbone's embed points get one. Without a prior there are none.
    A fresh embedding is an exact identity, so a new prior leaves a pretrained backbone as it was.
    """

    def __init__(
        self,
        backbone: nn.Module,
        prior: PriorNetwork | None = None,
        spe: SpeConfig | None = None,
        *,
        gate: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.prior = backbone, prior
        self.spe = nn.ModuleDict()
        spe, known = spe or SpeConfig(), backbone.embed_points
        names = known if spe.points is None else [choose("embed point", name, known) for name in spe.points]
        levels = len(prior.channels) if prior is not None else 0
        self.read = [level - 1 for level in spe.levels] if spe.levels is not None else list(range(levels))
        for name in names if prior is not None else ():
            channels, stride = known[name]
            if channels % spe.heads:
                raise ValueError(
                    f"{spe.heads} heads do not divide the {channels} channels of embed point {name} (stride {stride}): "
                    "change spe.heads or the backbone's width"
                )
            read = [prior.channels[level] for level in self.read]
            self.spe[name] = SemanticPriorEmbedding(read, channels, spe.dim, spe.groups, spe.heads)
        self.multiple = math.lcm(backbone.stride_multiple, prior.strides[-1] if prior is not None else 1)
        self.gate = None
        if gate:
            self.gated_by = prior.strides.index(STRIDE) if prior is not None and STRIDE in prior.strides else None
            self.gate = CorrectionGate(prior.channels[self.gated_by] if self.gated_by is not None else 0)
            self.multiple = math.lcm(self.multiple, STRIDE)

    def forward(self, blurry: torch.Tensor, *given: torch.Tensor, prior_only: bool = False) -> Deblurred:
        """Restore; with `prior_only` run the prior network alone (stage `distill`; `restored` is then empty).

        given: levels [B, c_l, H/s_l, W/s_l] in place of the prior's own, whose network then does not run: a study's
        oracle. ValueError unless H and W are multiples of `multiple`.
        """
        if blurry.ndim != 4 or blurry.shape[1] != 3:
            raise ValueError(f"a deblurrer takes an RGB batch [B, 3, H, W] in [0, 1], got {list(blurry.shape)}")
        if prior_only and self.prior is None:
            raise ValueError("this model has no prior network: there is nothing to distill")
        height, width = blurry.shape[-2:]
        padded = pad_to_multiple(blurry, self.multiple)
        if given and (self.prior is None or padded.shape != blurry.shape):
            raise ValueError(
                f"levels in place of a prior's need a model with a prior, and images whose sides are multiples of "
                f"{self.multiple} px; got {width}×{height}"
            )
        levels, features = given or None, None
        if self.prior is not None and not given:
            levels, features = self.prior(padded)

        def cropped(maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            """The part of each map that stands for the image, without what stands for the padding alone."""
            rows, columns = padded.shape[-2:]
            return tuple(m[..., : -(-height * m.shape[-2] // rows), : -(-width * m.shape[-1] // columns)] for m in maps)

        restored, extent, own = ((), None, None) if prior_only else self._restore(padded, levels)
        gated = (extent, None if own is None else cropped((own,))[0])
        if levels is None:
            return Deblurred(cropped(restored), None, None, *gated)
        comparable = features is not None and self.prior.comparable
        return Deblurred(cropped(restored), cropped(levels), cropped(features) if comparable else None, *gated)

    def _restore(
        self, padded: torch.Tensor, levels: tuple[torch.Tensor, ...] | None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None, torch.Tensor | None]:
        standard = self.prior.standardise(levels) if levels is not None else None
        restored = self.backbone(padded) if not self.spe else self._embedded(padded, standard)
        if self.gate is None:
            return restored, None, None
        level = standard[self.gated_by] if standard is not None and self.gated_by is not None else None
        gated, extent = self.gate(padded, restored[-1], level)
        return (*restored[:-1], gated), extent, restored[-1]

    def _embedded(self, padded: torch.Tensor, standard: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        scaled = tuple(standard[level] for level in self.read)

        def embed(name: str, feature: torch.Tensor) -> torch.Tensor:
            return self.spe[name](feature, scaled) if name in self.spe else feature

        return self.backbone(padded, embed)

    def calibrate(self, statistics: FeatureStatistics, images: Iterable[torch.Tensor]) -> None:
        """Fix the prior's feature scales on a fresh model, before training: see `PriorNetwork.calibrate`."""
        if self.prior is not None:
            self.prior.calibrate(statistics, images)


def build_deblurrer(config: ModelConfig, *, seed: int = 0, read_weights: bool = True) -> Deblurrer:
    """Build the deblurrer that a configuration names.

    The teachers only say which features the prior predicts, side by side, and what the student starts from where it
    has no name of its own. read_weights False reads no weights (to load a state dict afterwards); on the meta device
    (`with torch.device("meta")`) none are read either.
    Initial weights depend on `seed` alone; the ambient generator is neither used nor moved.
    Raises ValueError naming the setting, and the nearest known name where a name is unknown.
    """
    student = config.student
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_backbone(**config.backbone)
        if not config.prior:
            return Deblurrer(network, gate=config.gate)
        specs = teacher_specs(config)
        encoder = build_encoder(
            specs[0] if student.name is None else EncoderSpec(student.name, student.weights, config.levels),
            batch_norm=student.batch_norm,
            frozen_levels=student.frozen_levels,
            prune=True,
            read=read_weights,
            seed=seed,
        )
        prior = PriorNetwork(encoder, [level_channels(spec) for spec in specs], student)
        return Deblurrer(network, prior, config.spe, gate=config.gate)


def build_backbone(name: str, **settings: Any) -> nn.Module:
    """Build a backbone of the table, or a preset with `settings` before its own, by name.

    ValueError naming the nearest for an unknown name or setting.
    """
    if name in PRESETS:
        return build_backbone(**(PRESETS[name] | settings))
    network = BACKBONES[choose("backbone", name, (*BACKBONES, *PRESETS))]
    known = inspect.signature(network).parameters
    for key in settings:
        if key not in known:
            raise unknown_name(f"setting of backbone {name}:", key, known)
    try:
        return network(**settings)
    except TypeError as error:
        raise ValueError(f"backbone {name} cannot be built from {settings}: {error}") from error
