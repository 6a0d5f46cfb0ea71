"""Losses of restoration and of cross-level feature learning, each a mean: no size or channel count changes its scale.

All arithmetic is fp32, also under autocast. A loss returns (total, parts): the scalar to differentiate, and its parts,
detached, by name, each before its weight.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from model.statistics import FeatureStatistics

Parts = dict[str, torch.Tensor]
GRIDS = (4, 2, 1)


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

    structure: mean over levels of Σ_k 2^-k · mean (pool_k n(r_l) − pool_k n(t_l))² / Σ_k 2^-k over the grids k = full,
        4×4, 2×2, 1×1 that are coarser than the level (hierarchical context loss, Chen et al., CVPR 2021). Mean over
        batch, channels and cells; predicting the teacher's mean everywhere scores at most about 1.
    context: 1 − cos of the spatially averaged n(r_L), n(t_L), mean over the batch: 0 to 2.
    logits: KL(teacher's classes of t_L ‖ of r_L) in nats, mean over the batch, through `classify`, the teacher's frozen
        head (`Teacher.logits`); 0 weight, the default, leaves it out and needs no head.

    forward(r, t) → (structure·w + context·w + logits·w, parts). The teacher's statistics are `calibrate`d once, before
    training, on the same batches on every rank; they are buffers of the state dict. ValueError before that.
    """

    def __init__(
        self,
        channels: Sequence[int],
        structure: float = 1.0,
        context: float = 1.0,
        logits: float = 0.0,
        classify: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        if min(structure, context, logits) < 0:
            raise ValueError(f"weights of feature losses are {structure}, {context}, {logits}: none can be negative")
        if logits and classify is None:
            raise ValueError(
                "the logits term needs the teacher's classifier: give classify=teacher.logits, or weight 0"
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
            r, t = self._standardise(prior), self._standardise(teacher)
            terms = {}
            if self.weights["structure"]:
                terms["structure"] = sum(_hierarchical(a, b) for a, b in zip(r, t, strict=True)) / len(r)
            if self.weights["context"]:
                terms["context"] = (1 - F.cosine_similarity(r[-1].mean((2, 3)), t[-1].mean((2, 3)))).mean()
            if self.weights["logits"]:
                student, target = (self._classify[0](x[-1].float()).log_softmax(1) for x in (prior, teacher))
                terms["logits"] = F.kl_div(student, target.detach(), reduction="batchmean", log_target=True)
            total = sum((self.weights[name] * term for name, term in terms.items()), torch.zeros_like(r[0].sum()))
        return total, {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def similarity(self, prior: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return, per level [L], the cosine of n(r_l) and n(t_l) over channels, averaged over positions and batch.

        1: the same direction everywhere; about 0: unrelated.
        """
        self._check(prior, teacher)
        with torch.autocast(prior[0].device.type, enabled=False):
            r, t = self._standardise(prior), self._standardise(teacher)
            return torch.stack([F.cosine_similarity(a, b, dim=1).mean() for a, b in zip(r, t, strict=True)])

    def _standardise(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [self.statistics.normalise(f.float(), level) for level, f in enumerate(features)]

    def _check(self, prior: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> None:
        mine, theirs = [tuple(f.shape) for f in prior], [tuple(f.shape) for f in teacher]
        if mine != theirs:
            raise ValueError(f"the prior's levels {mine} do not match the teacher's {theirs}: same crop, same levels")
        if not self.statistics.calibrated:
            raise ValueError("feature losses are not calibrated: call calibrate with teacher features before training")


def _hierarchical(r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean, over the grids, of the mean squared difference of pooled r and t [B, C, h, w]."""
    difference = r - t
    loss, weights = difference.square().mean(), 1.0
    for k, grid in enumerate(GRIDS, start=1):
        if grid < max(difference.shape[-2:]):
            loss = loss + 2.0**-k * _pool(difference, grid).square().mean()
            weights += 2.0**-k
    return loss / weights


def _pool(x: torch.Tensor, grid: int) -> torch.Tensor:
    """Average x [B, C, h, w] over an at most grid × grid partition of its cells.

    Products with averaging matrices, because adaptive pooling's gradient is not deterministic on CUDA.
    """
    rows, columns = (_averaging(size, min(grid, size), x) for size in x.shape[-2:])
    return rows @ x @ columns.T


def _averaging(size: int, cells: int, like: torch.Tensor) -> torch.Tensor:
    """Return [cells, size]: row i averages the entries from ⌊i·size/cells⌋ up to ⌈(i+1)·size/cells⌉."""
    matrix = torch.zeros(cells, size)
    for i in range(cells):
        start, stop = i * size // cells, math.ceil((i + 1) * size / cells)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix.to(like)
