"""Restore one pair and measure it: what `sharpprior evaluate` does with every picture."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.errors import DataError
from train.evaluate.baselines import Baselines
from train.evaluate.metrics import measured
from train.evaluate.pairs import Pair
from train.evaluate.scores import INPUT
from train.evaluate.yardsticks import Yardsticks
from train.objective.task import DeblurTask
from train.restore.memory import forward_bytes, free_bytes
from train.restore.tiles import Way, restore_image

RESTORED = "restored"
SIMILARITIES = ("similarity", "blurry_similarity", "student_similarity")  # to the teacher: of prior, blurry, student


class Measuring:
    """A network with all that decides what it gives, and what is measured of it.

    names: of metrics. tile: side in px; None: whole pictures. auto: whole pictures where memory allows, else tiles of
    that side. precision: of autocast, None for the weights' own. task: of a run with a prior, whose likeness to its
    teacher is measured too, on crops. baselines: what is known already of inputs and yardsticks.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        device: torch.device,
        *,
        names: Sequence[str],
        tile: int | None = None,
        auto: bool = False,
        precision: torch.dtype | None = None,
        yardsticks: Yardsticks | None = None,
        task: DeblurTask | None = None,
        baselines: Baselines | None = None,
    ) -> None:
        self.network, self.device = network, device
        self._names, self._tile, self._auto, self._task = tuple(names), tile, auto, task
        self._way, self._yardsticks, self._baselines = Way(precision), yardsticks or Yardsticks(), baselines
        self._needed: dict[tuple[int, int], int] = {}

    @torch.no_grad()
    def restore(self, blurry: Tensor) -> tuple[Tensor, int]:
        """(restored, number of tiles) of a blurry picture, both uint8 [3, H, W] on the CPU. DataError where the network
        gives values that are not finite."""
        tiles = 1

        def counted(done: int, every: int) -> None:
            nonlocal tiles
            tiles = every

        # As floats: integers would hide values that are not finite.
        image = restore_image(
            self.network, blurry.float().div(255), self._side(*blurry.shape[-2:]), counted, way=self._way
        )
        return _to_uint8(image), tiles

    def _side(self, height: int, width: int) -> int | None:
        """Of this picture's tiles, None for the whole: what a square of as many pixels needs is what it needs."""
        if not self._auto:
            return self._tile
        size = (height, width)
        if size not in self._needed:
            multiple = self.network.multiple
            side = math.ceil(math.sqrt(height * width) / multiple) * multiple
            self._needed[size] = forward_bytes(self.network, side, self._way)
        return None if self._needed[size] <= free_bytes(self.device, math.inf) else self._tile

    @torch.no_grad()
    def crop(self, pair: Pair) -> tuple[Tensor, dict[str, list[float]]]:
        """(restored uint8 [3, H, W] on the CPU, cosine similarities to the teacher a level) of a crop, which goes
        through the network whole. Similarities are empty without a prior, and of an oracle."""
        with self._autocast():
            blurry, sharp = (image[None].to(self.device).float().div(255) for image in pair[:2])
            task, likeness = self._task, {}
            given = task.given(sharp) if task is not None else ()
            out = self.network(blurry, *given)
            # An oracle's levels are the teacher's: their likeness is 1, and no prior's.
            if task is not None and task.teacher is not None and out.prior is not None and not given:
                target = task.teacher(sharp)
                seen_by = [out.prior, task.teacher(blurry), *([out.student] if out.student is not None else [])]
                values = [task.similarity(features, target).double().tolist() for features in seen_by]
                likeness = dict(zip(SIMILARITIES, values, strict=False))
        return _to_uint8(out.restored[-1][0]), likeness

    def picture(self, pair: Pair, tier: str, *, crop: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(what a picture's record says, the pictures that it is of: input, restored and by each yardstick, uint8
        [3, H, W]). tier: "" where it is not known. crop: as `crop`, else as `restore`.

        seconds: of the restoration alone. DataError as `restore`.
        """
        self._wait()
        started = time.perf_counter()
        if crop:
            (restored, likeness), tiles = self.crop(pair), 1
        else:
            restored, tiles = self.restore(pair.blurry)
            likeness = {}
        self._wait()
        seconds = time.perf_counter() - started
        before = self._baseline(pair.blurry, pair.sharp)
        known = {"input_psnr": before["psnr"]} if "psnr" in before else {}
        made = self._yardsticks.apply(pair.blurry.to(self.device), tier, pair.kernel, **known)
        record = {
            "extent": pair.extent if math.isfinite(pair.extent) else None,
            "width": pair.sharp.shape[-1],
            "height": pair.sharp.shape[-2],
            "tiles": tiles,
            "seconds": round(seconds, 4),
            "input": before,
            "restored": self.measure(restored, pair.sharp),
            "yardsticks": {name: self._baseline(image, pair.sharp) for name, image in made.items()},
        }
        pictures = {INPUT: pair.blurry, RESTORED: restored, **made}
        return record | ({"teacher": likeness} if likeness else {}), pictures

    def measure(self, image: Tensor, sharp: Tensor) -> dict[str, float]:
        """Every metric of a picture, both uint8 [3, H, W]."""
        first, second = (each[None].to(self.device) for each in (image, sharp))
        return measured(first, second, self._names)[0]

    def _baseline(self, image: Tensor, sharp: Tensor) -> dict[str, float]:
        """`measure` of a picture that no network made."""
        if self._baselines is None:
            return self.measure(image, sharp)
        return self._baselines.measured(image, sharp, self._names, lambda: self.measure(image, sharp))

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self._way.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._way.precision)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _to_uint8(image: Tensor) -> Tensor:
    """Clamped and rounded as papers do it; DataError for what no picture can be made of."""
    image = image.float()
    if not image.isfinite().all():
        raise DataError("the network gave values that are not finite: nothing to measure")
    return image.clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
