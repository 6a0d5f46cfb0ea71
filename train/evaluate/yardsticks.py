"""What anyone can do without a model: the best Gaussian smoothing and the best unsharp masking of each severity tier,
and of each bin of input PSNR for pairs whose tier nobody knows, chosen on training pairs; and classical deconvolution
where the kernel is uniform and known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from data.blur import TIERS
from data.blur.generators import VARYING
from data.files import replacing
from train.evaluate.bins import BINS, bin_of, nearest_bin
from train.evaluate.deconvolution import richardson_lucy, richardson_lucy_after, wiener
from train.evaluate.metrics import measured, to_uint8

SIGMAS = (0.4, 0.5, 0.6, 0.8, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)  # px
AMOUNTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0)
NOISES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
ITERATIONS = (5, 10, 20, 40, 60)
ALL = "all"  # the tier of pairs of which nothing is known
FORMAT = 2  # 1: without the bins


class OutdatedError(ValueError):
    """Yardsticks of an older version of this package, which lack settings: they are to be made anew."""


@dataclass(frozen=True)
class Yardsticks:
    """Settings per tier, per bin of input PSNR (`bins.BINS`), and under "all" for pairs of any other.

    gaussian: σ in px (0: left as it is); unsharp: (σ in px, amount); wiener: ratio of noise to signal power;
    richardson_lucy: iterations. pairs: how many training pairs the first two were chosen on; digest: of what those
    are. Without an entry, a yardstick makes nothing.
    """

    gaussian: dict[str, float] = field(default_factory=dict)
    unsharp: dict[str, tuple[float, float]] = field(default_factory=dict)
    wiener: dict[str, float] = field(default_factory=dict)
    richardson_lucy: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    digest: str = ""

    def apply(
        self, blurry: Tensor, tier: str, kernel: np.ndarray | None = None, *, input_psnr: float | None = None
    ) -> dict[str, Tensor]:
        """What each yardstick makes of a blurry uint8 RGB [3, H, W], by name, on its device.

        kernel: [k, k] of a uniform blur, where it is known (`known_kernel`); without one the deconvolutions make
        nothing. input_psnr: dB, by whose bin a pair has its settings whose tier is no severity, as a recorded one; it
        needs the sharp picture, and is known in evaluation alone. Smoothing is computed on the CPU in any case, so that
        it is the same on every machine.
        """
        made: dict[str, Tensor] = {}
        if tier not in TIERS and input_psnr is not None:
            tier = bin_of(input_psnr)
        if self.gaussian:
            image = _planes(blurry)
            sigma, (radius, amount) = _of(self.gaussian, tier), _of(self.unsharp, tier)
            made["gaussian"] = _picture(smoothed(image, sigma)).to(blurry.device)
            made["unsharp"] = _picture(image + amount * (image - smoothed(image, radius))).to(blurry.device)
        if self.wiener and kernel is not None:
            light = blurry.float().div(255)
            made["wiener"] = to_uint8(wiener(light, kernel, _of(self.wiener, tier)))
            made["richardson_lucy"] = to_uint8(richardson_lucy(light, kernel, _of(self.richardson_lucy, tier)))
        return made

    def save(self, path: Path) -> None:
        """Write them as JSON, whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Yardsticks:
        """Read what `save` wrote. ValueError naming the file where it is another thing, OutdatedError where an older
        version wrote it."""
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if (written := facts.pop("format")) in range(1, FORMAT):
                raise OutdatedError(f"{path}: yardsticks of an older version, which lack settings: they are made anew")
            if written != FORMAT:
                raise ValueError("another format")
            unsharp = {tier: (float(sigma), float(amount)) for tier, (sigma, amount) in facts.pop("unsharp").items()}
            return cls(unsharp=unsharp, **facts)
        except OutdatedError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: not the yardsticks of a run ({error}): delete it, and they are made anew"
            ) from None


class Moments(NamedTuple):
    """What choosing needs of one pair, with e = blurry − sharp and d = blurry − smoothed by each of `SIGMAS`: the means
    of e², e·d and d² over pixels and channels. Blurry + a·d has the mean squared error e² + 2a·ed + a²·d²."""

    tier: str
    ee: float
    ed: tuple[float, ...]
    dd: tuple[float, ...]

    @property
    def psnr(self) -> float:
        """Of the blurry picture, dB."""
        return 10 * math.log10(255**2 / max(self.ee, 1e-2))


def moments(blurry: Tensor, sharp: Tensor, tier: str) -> Moments:
    """The moments of a pair of uint8 RGB [3, H, W] pictures."""
    image = _planes(blurry)
    error = image - _planes(sharp)
    ed, dd = [], []
    for sigma in SIGMAS:
        detail = image - smoothed(image, sigma)
        ed.append(_mean_product(error, detail))
        dd.append(_mean_product(detail, detail))
    return Moments(tier, _mean_product(error, error), tuple(ed), tuple(dd))


def choose(found: Sequence[Moments], digest: str = "") -> Yardsticks:
    """The settings of the highest mean PSNR over each tier's pairs, over each bin's, and over all; the first of equals,
    which is to leave pictures as they are. Bins without pairs have their nearest neighbour's. In another order of the
    pairs they are the same."""
    of: dict[str, list[Moments]] = {}
    for each in sorted(found):
        for name in dict.fromkeys((each.tier, bin_of(each.psnr), ALL)):
            of.setdefault(name, []).append(each)
    gaussian: dict[str, float] = {}
    unsharp: dict[str, tuple[float, float]] = {}
    for tier, rows in of.items():
        ee = np.array([row.ee for row in rows])[:, None, None]
        ed, dd = (np.array([getattr(row, name) for row in rows])[:, :, None] for name in ("ed", "dd"))

        def quality(amounts: Sequence[float], ee=ee, ed=ed, dd=dd) -> np.ndarray:
            """Mean PSNR [σ, amount] up to a constant; equal pictures count as an error of 1/100 of a code's square."""
            a = np.array(amounts)[None, None]
            return -np.log10(np.maximum(ee + 2 * a * ed + a * a * dd, 1e-2)).mean(axis=0)

        smoothing = [quality([0.0])[0, 0], *quality([-1.0])[:, 0]]
        gaussian[tier] = (0.0, *SIGMAS)[int(np.argmax(smoothing))]
        amount, sigma = np.unravel_index(int(np.argmax(quality(AMOUNTS).T)), (len(AMOUNTS), len(SIGMAS)))
        unsharp[tier] = SIGMAS[int(sigma)], AMOUNTS[int(amount)]
    for name in BINS if found else ():
        nearest = nearest_bin(name, of)
        gaussian[name], unsharp[name] = gaussian[nearest], unsharp[nearest]
    return Yardsticks(gaussian, unsharp, pairs=len(found), digest=digest)


def fit(pairs: Iterable[dict]) -> Yardsticks:
    """Choose on training pairs, as `data.stream.validation.validation_pairs` yields them; no pairs, no yardsticks."""
    return choose([moments(pair["blurry"], pair["sharp"], pair["tier"]) for pair in pairs])


def fit_deconvolution(yardsticks: Yardsticks, pairs: Iterable[dict], device: torch.device) -> Yardsticks:
    """The yardsticks with deconvolution's settings too, chosen on those training pairs whose kernel is known (a second
    a pair on a CPU); without one there are none."""
    quality: dict[str, list[tuple[list[float], list[float]]]] = {}
    for pair in pairs:
        if (kernel := known_kernel(pair)) is not None:
            light, sharp = (pair[name].to(device) for name in ("blurry", "sharp"))
            light = light.float().div(255)
            results = [wiener(light, kernel, noise) for noise in NOISES]
            results += richardson_lucy_after(light, kernel, ITERATIONS)
            psnr = [
                row["psnr"]
                for row in measured(to_uint8(torch.stack(results)), sharp.expand(len(results), -1, -1, -1), ["psnr"])
            ]
            for tier in (pair["tier"], ALL):
                quality.setdefault(tier, []).append((psnr[: len(NOISES)], psnr[len(NOISES) :]))
    best = {
        tier: [int(np.argmax(np.mean(column, axis=0))) for column in zip(*rows, strict=True)]
        for tier, rows in quality.items()
    }
    return replace(
        yardsticks,
        wiener={tier: NOISES[noise] for tier, (noise, _) in best.items()},
        richardson_lucy={tier: ITERATIONS[count] for tier, (_, count) in best.items()},
    )


def known_kernel(pair: dict) -> np.ndarray | None:
    """The kernel [k, k] of a validation pair whose blur is one kernel everywhere and moves something, else None."""
    kernel = pair["kernel"]
    return None if kernel is None or pair["generator"] in VARYING or len(kernel) == 1 else kernel


def smoothed(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian smoothing of [H, W, 3] float32 by σ px, reflected at the borders; σ 0 leaves it."""
    if sigma == 0:
        return image
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)


def _of(settings: dict[str, Any], tier: str) -> Any:
    return settings.get(tier, settings[ALL])


def _mean_product(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.mean(first * second, dtype=np.float64))


def _planes(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()).astype(np.float32)


def _picture(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.rint(image.clip(0, 255)).astype(np.uint8).transpose(2, 0, 1).copy())
