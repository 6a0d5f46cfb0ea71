"""Cross-level feature learning: how far the prior is from the teacher's features."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from model.names import choose
from model.statistics import FeatureStatistics
from train.config.schema import LossSection
from train.objective.matching import MATCHES
from train.objective.restoration import Parts


class CrossLevelFeatureLoss(nn.Module):
    """How far the prior r_l is from the teacher's features t_l (each [B, c_l, h_l, w_l]); n(·) standardises by channel.

    structure: mean over levels of what `match` names in `MATCHES`; by default (cross_level) the
        hierarchical context loss of n(r_l), n(t_l). Predicting the teacher's mean everywhere scores at most about 1.
    context: 1 − cos of the spatially averaged n(r_L), n(t_L), mean over the batch: 0 to 2.
    logits: KL(teacher's classes of t_L ‖ of r_L) in nats, mean over the batch, through `classify`, the teacher's frozen
        head (`Teacher.logits`); 0 weight, the default, leaves it out and needs no head.

    splits, shares: several teachers side by side, as `Teachers` has them: each level's channels by teacher, and each
    teacher's part (sum 1). Every term is then the mean of the teachers' own, weighed by their part; `classify` gives
    one tensor a teacher.

    forward(r, t) → (structure·w + context·w + logits·w, parts). The teacher's statistics are `calibrate`d once, before
    training, on the same batches on every rank; they are buffers of the state dict. ValueError before that.
    """

    def __init__(
        self,
        channels: Sequence[int],
        loss: LossSection,
        *,
        classify: Callable[[torch.Tensor], torch.Tensor | Sequence[torch.Tensor]] | None = None,
        splits: Sequence[Sequence[int]] | None = None,
        shares: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        if loss.logits and classify is None:
            raise ValueError(
                "the logits term needs the teacher's classifier: give classify=teacher.logits, or weight 0"
            )
        self.match = MATCHES[choose("loss.match", loss.match, MATCHES)]
        self.splits = [list(split) for split in splits] if splits is not None else [[c] for c in channels]
        self.shares = tuple(shares)
        if [sum(split) for split in self.splits] != list(channels) or {len(s) for s in self.splits} != {len(shares)}:
            raise ValueError(
                f"{len(shares)} teachers' channels {self.splits} do not add up to the levels' {list(channels)}"
            )
        self.statistics = FeatureStatistics(channels)
        self.weights = {"structure": loss.structure, "context": loss.context, "logits": loss.logits}
        # In a tuple, so that a bound method's module (the teacher) never becomes a submodule with parameters.
        self._classify = (classify,)
        self._ready = False

    def calibrate(self, batches: Iterable[Sequence[torch.Tensor]]) -> None:
        """Measure the statistics on teacher features: each batch L tensors [B, c_l, h_l, w_l]; then fix them."""
        for features in batches:
            self.statistics.update(features)
        self.statistics.freeze()

    def forward(self, prior: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Parts]:
        self._check(prior, teacher)
        with torch.autocast(prior[0].device.type, enabled=False):
            prior, teacher = [f.float() for f in prior], [f.float() for f in teacher]
            r, t = self._standardise(prior), self._standardise(teacher)
            terms = {}
            if self.weights["structure"]:
                pairs = zip(r, t, strict=True) if self.match.standardised else zip(prior, teacher, strict=True)
                levels = [self._shared(self.match.distance, a, b, i) for i, (a, b) in enumerate(pairs)]
                terms["structure"] = sum(levels) / len(levels)
            if self.weights["context"]:
                terms["context"] = self._shared(_context, r[-1], t[-1], -1)
            if self.weights["logits"]:
                terms["logits"] = self._divergence(prior[-1], teacher[-1])
            total = sum((self.weights[name] * term for name, term in terms.items()), torch.zeros_like(r[0].sum()))
        return total, {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def similarity(self, features: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return, per level [L], the cosine of n(r_l) and n(t_l) over channels, averaged over positions and batch.

        1: the same direction everywhere; about 0: unrelated. Several teachers: the mean of each one's cosine, weighed
        by its part; features with the first teacher's channels alone are compared with that teacher's.
        """
        first = [split[0] for split in self.splits]
        of_first = len(self.shares) > 1 and [f.shape[1] for f in features] == first
        if of_first:
            teacher = [t[:, :c] for t, c in zip(teacher, first, strict=True)]
        self._check(features, teacher)
        with torch.autocast(features[0].device.type, enabled=False):
            pairs = zip(self._standardise(features), self._standardise(teacher), strict=True)
            return torch.stack(
                [_cosine(r, t) if of_first else self._shared(_cosine, r, t, i) for i, (r, t) in enumerate(pairs)]
            )

    def _shared(self, distance: Callable, r: torch.Tensor, t: torch.Tensor, level: int) -> torch.Tensor:
        """The mean of a distance between each teacher's channels of a level, weighed by the teachers' parts."""
        parts = zip(self.shares, *(x.split(self.splits[level], dim=1) for x in (r, t)), strict=True)
        return sum(share * distance(a, b) for share, a, b in parts)

    def _divergence(self, prior: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        student, target = (self._classify[0](x) for x in (prior, teacher))
        if isinstance(student, torch.Tensor):
            student, target = (student,), (target,)
        return sum(
            share * F.kl_div(a.log_softmax(1), b.log_softmax(1).detach(), reduction="batchmean", log_target=True)
            for share, a, b in zip(self.shares, student, target, strict=True)
        )

    def _standardise(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """n(·) of levels that have all the statistics' channels, or the first teacher's alone."""
        moments = [[m[: f.shape[1]] for m in self.statistics.moments(level)] for level, f in enumerate(features)]
        return [(f.float() - mean) / std for f, (mean, std) in zip(features, moments, strict=True)]

    def _check(self, prior: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> None:
        mine, theirs = [tuple(f.shape) for f in prior], [tuple(f.shape) for f in teacher]
        if mine != theirs:
            raise ValueError(f"the prior's levels {mine} do not match the teacher's {theirs}: same crop, same levels")
        self._ready = self._ready or self.statistics.calibrated  # asked once: reading a flag on a GPU waits for it
        if not self._ready:
            raise ValueError("feature losses are not calibrated: call calibrate with teacher features before training")


def _context(r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (1 - F.cosine_similarity(r.mean((2, 3)), t.mean((2, 3)))).mean()


def _cosine(r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(r, t, dim=1).mean()
