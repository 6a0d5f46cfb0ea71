"""What is learned: the trained module, its frozen teacher, and the losses; a batch goes in, a loss comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from model.deblurrer import Deblurrer
from model.names import choose
from model.teachers import Teachers, build_teachers
from train.config.schema import Config
from train.objective.cross_level import CrossLevelFeatureLoss
from train.objective.matching import MATCHES
from train.objective.restoration import RestorationLoss
from train.objective.targets import CachedTargets, cache_spec


class DeblurTask:
    """Teacher and losses of a run (without a prior, or with one that never learns: the restoration loss alone).

    The teacher is not part of the trained module and not in any checkpoint.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        check_loss(config)
        self.restoration = RestorationLoss(config.loss)
        self.teacher: Teachers | None = None
        self.features: CrossLevelFeatureLoss | None = None
        self.targets: CachedTargets | None = None
        if config.taught:
            self.teacher = build_teachers(config.model).to(device)
            classify = None
            if config.loss.logits:
                self.teacher.check_classifiers()
                classify = self.teacher.logits
            teacher = {"splits": self.teacher.splits, "shares": self.teacher.weights, "classify": classify}
            self.features = CrossLevelFeatureLoss(self.teacher.channels, config.loss, **teacher).to(device)

    def calibrate(self, module: Deblurrer, images: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure the features' scales of a fresh run on (blurry, sharp) uint8 batches, the same ones on every rank."""
        if self.teacher is None or self.features is None:
            return
        pairs = [(as_float(blurry, self.device), as_float(sharp, self.device)) for blurry, sharp in images]
        self.features.calibrate(self.teacher(sharp) for _, sharp in pairs)
        module.calibrate(self.features.statistics, (blurry for blurry, _ in pairs))

    def open_targets(self, rank: int, over_ranks: Callable[[Tensor], Tensor] = lambda values: values) -> None:
        """Have the training batches' features come through the node's cache, where the configuration wants one."""
        if self.teacher is not None and self.config.features.cache != "off":
            self.targets = CachedTargets(self.teacher, self.config, self.device, rank, over_ranks)

    def close_targets(self) -> None:
        """No batch's features are asked for any more: let the cache finish its writing."""
        if self.targets is not None:
            self.targets.retire()

    @cached_property
    def teacher_digest(self) -> str | None:
        """Digest of the teacher's weights, None without one."""
        return self.teacher.weights_digest() if self.teacher is not None else None

    @property
    def cache_fingerprint(self) -> str | None:
        """What the run's feature cache is known by, None without one."""
        if self.teacher is None or self.config.features.cache == "off":
            return None
        return cache_spec(self.teacher, self.config).fingerprint

    def losses(
        self,
        forward: Callable[..., Any],
        batch: dict,
        *,
        distill: bool,
        autocast: contextlib.AbstractContextManager,
        cfl: float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch (a mean over its pairs) and its detached parts. distill: the student alone learns. cfl:
        the weight λ of its feature losses beside the restoration loss; None: the configuration's first."""
        blurry, sharp = as_float(batch["blurry"], self.device), as_float(batch["sharp"], self.device)
        if distill:
            out = forward(blurry, prior_only=True)
        else:
            with autocast:
                given = self.given(sharp)
            out = forward(blurry, *given)
        total, parts = sharp.new_zeros(()), {}
        if not distill:
            restored = out.restored
            if out.own is not None:
                smaller = (self._blurred_alone(each, batch) for each in restored[:-1])
                restored = (*smaller, restored[-1])
            loss, parts = self.restoration(restored, sharp)
            total = total + loss
            if out.own is not None:  # the gate's image teaches the gate alone
                loss, own = self.restoration((self._blurred_alone(out.own, batch),), sharp)
                total = total + loss
                parts |= {f"own_{name}": value for name, value in own.items()}
            if out.extent is not None and self.config.loss.extent:
                parts["extent"] = extent_error(out.extent, batch["extent"].to(self.device, non_blocking=True))
                total = total + self.config.loss.extent * parts["extent"]
                parts["extent"] = parts["extent"].detach()
        weight = 1.0 if distill else self.config.loss.cfl if cfl is None else cfl
        if self.teacher is not None and self.features is not None and weight > 0:
            if self.targets is None:
                with autocast:
                    target = self.teacher(sharp)
            else:
                target = self.targets(sharp, batch, autocast)
            loss, more = self.features(out.prior, target)
            total = total + weight * loss
            parts = {**parts, **more}
            if self.targets is not None:
                parts["cached"] = sharp.new_full((), self.targets.share)  # a fill: a copy from here would wait
        if self.config.loss.cfl_final is not None:
            parts["cfl_weight"] = sharp.new_full((), weight)
        return total, parts

    def _blurred_alone(self, own: Tensor, batch: dict) -> Tensor:
        """The network's images [B, 3, H, W] themselves, without a gradient to those of pairs without blur."""
        blurred = batch["extent"].to(self.device, non_blocking=True) != 0  # NaN: recorded, not known
        return torch.where(blurred[:, None, None, None], own, own.detach())

    def given(self, sharp: Tensor) -> tuple[Tensor, ...]:
        """What the embeddings read in place of the prior: of an oracle the teacher's features of sharp [B, 3, H, W]."""
        return tuple(self.teacher(sharp)) if self.config.model.oracle else ()

    @property
    def similarity(self) -> Callable | None:
        """Per-level similarity of the prior to the teacher's features, None without a prior."""
        return self.features.similarity if self.features is not None else None

    def state_dict(self) -> dict:
        """The measured statistics."""
        return self.features.state_dict() if self.features is not None else {}

    def load_state_dict(self, state: dict) -> None:
        """Take the statistics back."""
        if self.features is not None:
            self.features.load_state_dict(state)


def check_loss(config: Config) -> None:
    """ValueError for a loss that the configuration names and no table knows, whether this run would use it or not."""
    RestorationLoss(config.loss)
    choose("loss.match", config.loss.match, MATCHES)


def extent_error(predicted: Tensor, extent: Tensor) -> Tensor:
    """Mean |predicted − log₂(1 + extent)| over the pairs whose extent [B] in px is known (not NaN), 0 where none is."""
    known = extent.isfinite()
    apart = (predicted.float() - torch.log2(1 + extent.nan_to_num())).abs() * known
    return apart.sum() / known.sum().clamp(min=1)


def as_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] → float32 in [0, 1] on the device."""
    return images.to(device, non_blocking=True).float().div(255)
