"""The prior network: a student that sees the BLURRY image and predicts the teacher's features of the sharp one."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from model.config import StudentConfig
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

    teachers: each teacher's channels (c_1, …, c_L); their features are put side by side, and the student's own can be
    the base of the first teacher's part alone.
    config: `width`, `fusion` and `residual`. fusion same_level leaves the fusion out, g_l = f_l(s_l), what cross-level
    learning is compared with; residual False forces the plain form, whose base is the teacher's mean.
    `calibrate` must be called once on a fresh network, before training; the numbers are part of its state dict.
    `rest` is for a prior that learns no more, or not now: it is then in eval mode whatever is asked, and takes no
    gradient, so that nothing of it is kept for a backward pass.
    ValueError if the levels differ in number, or a residual prior has no base.
    """

    def __init__(self, student: Encoder, teachers: Sequence[Sequence[int]], config: StudentConfig) -> None:
        super().__init__()
        channels, first = tuple(map(sum, zip(*teachers, strict=True))), tuple(teachers[0])
        if len(channels) != len(student.channels):
            raise ValueError(f"the student has {len(student.channels)} levels, the teacher {len(channels)}")
        self.comparable = first == student.channels
        if config.residual and not self.comparable:
            raise ValueError(
                f"a residual prior needs the teacher's channels {list(first)}, but student {student.spec.name} has "
                f"{list(student.channels)}: leave residual out, or name the teacher's architecture"
            )
        self.student, self.channels, self.strides = student, channels, student.strides
        self.resting, self._mode = False, True
        self.residual, width = self.comparable if config.residual is None else config.residual, config.width
        self.statistics = FeatureStatistics(channels)
        self.student_statistics = FeatureStatistics(student.channels)
        self.project = nn.ModuleList(nn.Conv2d(c, width, 1) for c in student.channels)
        self.fuse = nn.ModuleList(Fusion(width) for _ in channels[:-1] if config.fusion == "cross_level")
        self.predict = nn.ModuleList(nn.Conv2d(width, c, 3, padding=1) for c in channels)
        if self.residual:
            for conv in self.predict:
                nn.init.zeros_(conv.weight)
                nn.init.zeros_(conv.bias)

    def forward(self, blurry: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Return the prior's levels r_l and the student's own features s_l that they were predicted from."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.resting):
            return self._levels(blurry)

    def _levels(self, blurry: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        features = self.student(blurry)
        results: list[torch.Tensor] = []
        fused = None
        for level in reversed(range(len(features))):
            own = self.project[level](self.student_statistics.normalise(features[level], level))
            fused = self.fuse[level](own, fused) if self.fuse and fused is not None else own
            mean, std = self.statistics.moments(level)
            base = self._base(features[level], mean) if self.residual else mean
            results.append(base + std * self.predict[level](fused))
        return tuple(reversed(results)), features

    def rest(self, resting: bool = True) -> None:
        """Rest, or learn again (on the student's own weights, where it was folded)."""
        self.resting = resting
        if not resting:
            self.student.unfold()
        self.train(self._mode)

    def train(self, mode: bool = True) -> "PriorNetwork":
        self._mode = mode
        return super().train(mode and not self.resting)

    @staticmethod
    def _base(feature: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """The student's feature for the first teacher's channels, the mean for the others'."""
        others = mean[feature.shape[1] :]
        if not len(others):
            return feature
        return torch.cat([feature, others.to(feature.dtype).expand(len(feature), -1, *feature.shape[-2:])], dim=1)

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
