"""Losses of restoration and of cross-level feature learning, each a mean: no size or channel count changes its scale.

All arithmetic is fp32, also under autocast. A loss returns (total, parts): the scalar to differentiate, and its parts,
detached, by name, each before its weight.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from model.names import choose
from model.statistics import FeatureStatistics
from train.matching import MATCHES

Parts = dict[str, torch.Tensor]


def charbonnier(restored: torch.Tensor, sharp: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """Return the mean of √(d² + eps²), d = restored − sharp in sRGB [0, 1], over all pixels and channels.

    A smooth L1 (Charbonnier et al., ICIP 1994); a perfect restoration scores eps.
    """
    return (restored - sharp).square().add(eps**2).sqrt().mean()


def l1(restored: torch.Tensor, sharp: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference in sRGB [0, 1] over all pixels and channels."""
    return (restored - sharp).abs().mean()


def frequency_l1(restored: torch.Tensor, sharp: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of the real and imaginary parts of the 2-D Fourier transforms.

    The multi-scale frequency term of MIMO-UNet (Cho et al., ICCV 2021), with the ORTHONORMAL transform: its size is
    that of the pixels' difference whatever the crop. The paper's transform is unnormalised, so its weight 0.1 on crops
    of 256 px corresponds to 0.1·√(256·256) = 25.6 here. Mean over the full spectrum, of which half is computed.
    """
    width = restored.shape[-1]
    spectrum = torch.view_as_real(torch.fft.rfft2(restored - sharp, norm="ortho")).abs()
    twice = torch.full((spectrum.shape[-2],), 2.0, device=spectrum.device)  # columns that stand for two of the full one
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    return (spectrum.mean(dim=(0, 1, 2, 4)) * twice).sum() / width


PIXEL_LOSSES = {"charbonnier": charbonnier, "l1": l1}


class RestorationLoss(nn.Module):
    """pixel + frequency · FFT-L1, averaged over the restored images; parts `pixel` and `frequency`.

    An output smaller than the sharp image is compared with its area-averaged reduction, as MIMO-UNet supervises its
    scales. forward(restored, sharp): restored = tuple of [B, 3, h, w], sharp [B, 3, H, W], sRGB in [0, 1].
    """

    def __init__(self, pixel: str = "charbonnier", frequency: float = 0.1) -> None:
        super().__init__()
        if pixel not in PIXEL_LOSSES:
            raise ValueError(f"unknown pixel loss '{pixel}': known: {', '.join(PIXEL_LOSSES)}")
        if frequency < 0:
            raise ValueError(f"the weight of the frequency loss is {frequency}: it cannot be negative")
        self.pixel, self.frequency = PIXEL_LOSSES[pixel], frequency

    def forward(self, restored: Sequence[torch.Tensor], sharp: torch.Tensor) -> tuple[torch.Tensor, Parts]:
        with torch.autocast(sharp.device.type, enabled=False):
            sharp = sharp.float()
            pixel = frequency = torch.zeros((), device=sharp.device)
            for image in restored:
                size = image.shape[-2:]
                target = sharp if size == sharp.shape[-2:] else F.interpolate(sharp, size=size, mode="area")
                pixel = pixel + self.pixel(image.float(), target) / len(restored)
                if self.frequency:
                    frequency = frequency + frequency_l1(image.float(), target) / len(restored)
            total = pixel + self.frequency * frequency
        parts = {"pixel": pixel.detach()} | ({"frequency": frequency.detach()} if self.frequency else {})
        return total, parts


class CrossLevelFeatureLoss(nn.Module):
    """How far the prior r_l is from the teacher's features t_l (each [B, c_l, h_l, w_l]); n(·) standardises by channel.

    structure: mean over levels of what `match` names in `train.matching.MATCHES`; by default (cross_level) the
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
        structure: float = 1.0,
        context: float = 1.0,
        logits: float = 0.0,
        classify: Callable[[torch.Tensor], torch.Tensor | Sequence[torch.Tensor]] | None = None,
        *,
        match: str = "cross_level",
        splits: Sequence[Sequence[int]] | None = None,
        shares: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        if min(structure, context, logits) < 0:
            raise ValueError(f"weights of feature losses are {structure}, {context}, {logits}: none can be negative")
        if logits and classify is None:
            raise ValueError(
                "the logits term needs the teacher's classifier: give classify=teacher.logits, or weight 0"
            )
        self.match = MATCHES[choose("match", match, MATCHES)]
        self.splits = [list(split) for split in splits] if splits is not None else [[c] for c in channels]
        self.shares = tuple(shares)
        if [sum(split) for split in self.splits] != list(channels) or {len(s) for s in self.splits} != {len(shares)}:
            raise ValueError(
                f"{len(shares)} teachers' channels {self.splits} do not add up to the levels' {list(channels)}"
            )
        self.statistics = FeatureStatistics(channels)
        self.weights = {"structure": structure, "context": context, "logits": logits}
        # In a tuple, so that a bound method's module (the teacher) never becomes a submodule with parameters.
        self._classify = (classify,)

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
        if not self.statistics.calibrated:
            raise ValueError("feature losses are not calibrated: call calibrate with teacher features before training")


def _context(r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (1 - F.cosine_similarity(r.mean((2, 3)), t.mean((2, 3)))).mean()


def _cosine(r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(r, t, dim=1).mean()
