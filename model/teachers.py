"""Several teachers as one: their features side by side, each with its weight."""

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from model.config import ModelConfig
from model.teacher import Teacher


class Teachers(nn.Module):
    """One or more frozen teachers seen as one pyramid: per level, their features concatenated over the channels.

    Attributes: `channels` (per level, of all teachers together); `strides`; `splits` (per level, each teacher's
    channels, in order: what `torch.split` takes); `weights` (each teacher's part of a loss, sum 1); `teachers`.
    weights: relative to each other; None: equal. ValueError for no teacher, other strides, or weights not above 0.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not teachers:
            raise ValueError("no teacher is named: give at least one")
        weights = [1.0] * len(teachers) if weights is None else list(weights)
        if len(weights) != len(teachers) or min(weights) <= 0:
            raise ValueError(f"{len(teachers)} teachers need a weight above 0 each, got {weights}")
        if any(teacher.strides != teachers[0].strides for teacher in teachers):
            raise ValueError(f"teachers differ in their strides: {[teacher.strides for teacher in teachers]}")
        self.teachers = nn.ModuleList(teachers)
        self.strides = teachers[0].strides
        self.splits = tuple(zip(*(teacher.channels for teacher in teachers), strict=True))
        self.channels = tuple(map(sum, self.splits))
        self.weights = tuple(weight / sum(weights) for weight in weights)

    @property
    def precision(self) -> str:
        """The lowest of the teachers' precisions where the weights are now: fp32 or bf16."""
        return "bf16" if any(teacher.precision == "bf16" for teacher in self.teachers) else "fp32"

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return level features, without gradient, fp32: sRGB [B, 3, H, W] in [0, 1] → [B, Σ c_l, ⌈H/s_l⌉, ⌈W/s_l⌉]."""
        if len(self.teachers) == 1:
            return self.teachers[0](image)
        features = [teacher(image) for teacher in self.teachers]
        return tuple(torch.cat(level, dim=1) for level in zip(*features, strict=True))

    def logits(self, deepest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return each teacher's class logits [B, K] of its part of the deepest feature [B, Σ c_L, h, w].

        ValueError naming the teacher that has no classifier behind its deepest level.
        """
        parts = deepest.split(self.splits[-1], dim=1)
        return tuple(teacher.logits(part) for teacher, part in zip(self.teachers, parts, strict=True))

    def check_classifiers(self) -> None:
        """Raise the ValueError of `logits` now, before training, where it would come."""
        for teacher in self.teachers:
            teacher.check_classifier()

    def weights_digest(self) -> str:
        """Return a hex digest of all weights, in the teachers' order."""
        return "+".join(teacher.weights_digest() for teacher in self.teachers)

    def fingerprint(self) -> str:
        """Return a hex digest of what decides the features, in their order: `Teacher.fingerprint`. Weights do not."""
        if len(self.teachers) == 1:
            return self.teachers[0].fingerprint()
        facts = "|".join(teacher.fingerprint() for teacher in self.teachers)
        return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()

    def train(self, mode: bool = True) -> "Teachers":
        """Stay in eval mode, whatever is asked."""
        return super().train(False)


def build_teachers(config: ModelConfig) -> Teachers:
    """A configuration's teachers with their weights, on the CPU. ValueError where weights are absent or unfit."""
    made = [
        Teacher(each.name, each.weights, config.levels, precision=each.precision, compiled=each.compile)
        for each in config.teacher
    ]
    return Teachers(made, [each.weight for each in config.teacher])
