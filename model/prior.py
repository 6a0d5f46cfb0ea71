"""The prior network: a student that sees the BLURRY image and predicts the teacher's features of the sharp one."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from model.encoder import Encoder
from model.statistics import FeatureStatistics


class Fusion(nn.Module):
    """Join a level with what comes up from the deeper ones: two sigmoid maps, from both, weigh them before the sum.

    own, deeper [B, M, h, w] → [B, M, h, w]. The attention-based fusion of review distillation (Chen et al., CVPR 2021).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Conv2d(2 * width, 2, 1)

    def forward(self, own: torch.Tensor, deeper: torch.Tensor) -> torch.Tensor:
        deeper = F.interpolate(deeper, size=own.shape[-2:], mode="nearest")
        weights = self.attention(torch.cat([own, deeper], dim=1)).sigmoid()
        return own * weights[:, :1] + deeper * weights[:, 1:]


class PriorNetwork(nn.Module):
    """Student encoder and cross-level fusion: blurry [B, 3, H, W] in [0, 1], sRGB → r_l [B, c_l, ⌈H/s_l⌉, ⌈W/s_l⌉].

    g_L = f_L(s_L);  g_l = fuse(f_l(s_l), up(g_{l+1}));  r_l = base_l + σ_l ⊙ o_l(g_l)
    with f a 1×1 convolution of the standardised student feature to `width`, o a 3×3 convolution to the teacher's c_l
    channels, and σ_l the teacher's standard deviations: all that is learned is in standardised units, so no teacher's
    feature scale unbalances the training. base_l is the student's own feature s_l where its channels are the teacher's
    (then o starts at 0 and the prior starts as the teacher's features of the blurry image), else the teacher's mean.
    That residual is our choice; the fusion is review distillation's (Chen et al., CVPR 2021).

    `calibrate` must be called once on a fresh network, before training; the numbers are part of its state dict.
    `residual` False forces the plain form, whose base is the teacher's mean.
    """

    def __init__(
        self, student: Encoder, channels: Sequence[int], width: int = 64, residual: bool | None = None
    ) -> None:
        super().__init__()
        if len(channels) != len(student.channels):
            raise ValueError(f"the student has {len(student.channels)} levels, the teacher {len(channels)}")
        same = tuple(channels) == student.channels
        if residual and not same:
            raise ValueError(
                f"a residual prior needs the teacher's channels {list(channels)}, but student {student.spec.name} has "
                f"{list(student.channels)}: leave residual out, or name the teacher's architecture"
            )
        self.student, self.channels, self.strides = student, tuple(channels), student.strides
        self.residual = same if residual is None else residual
        self.statistics = FeatureStatistics(channels)
        self.student_statistics = FeatureStatistics(student.channels)
        self.project = nn.ModuleList(nn.Conv2d(c, width, 1) for c in student.channels)
        self.fuse = nn.ModuleList(Fusion(width) for _ in channels[:-1])
        self.predict = nn.ModuleList(nn.Conv2d(width, c, 3, padding=1) for c in channels)
        if self.residual:
            for conv in self.predict:
                nn.init.zeros_(conv.weight)
                nn.init.zeros_(conv.bias)

    def forward(self, blurry: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.student(blurry)
        results: list[torch.Tensor] = []
        fused = None
        for level in reversed(range(len(features))):
            own = self.project[level](self.student_statistics.normalise(features[level], level))
            fused = own if fused is None else self.fuse[level](own, fused)
            mean, std = self.statistics.moments(level)
            base = features[level] if self.residual else mean
            results.append(base + std * self.predict[level](fused))
        return tuple(reversed(results))

    def standardise(self, levels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the levels in standardised units, n(r_l): what the embedding layers read."""
        return tuple(self.statistics.normalise(r, level) for level, r in enumerate(levels))

    @torch.no_grad()
    def calibrate(self, statistics: FeatureStatistics, images: Iterable[torch.Tensor]) -> None:
        """Fix the scales: the teacher's from its statistics, the student's from its features of images [B, 3, H, W].

        Every rank must be given the same images.
        """
        self.statistics.copy_from(statistics)
        was_training = self.training
        self.eval()
        for image in images:
            self.student_statistics.update(self.student(image))
        self.student_statistics.freeze()
        self.train(was_training)
