"""A model that restores what Python programs hold pictures in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from train.checkpoint.saved import describe, load_model, refuse_oracle
from train.restore.kinds import unpacked
from train.restore.memory import fitting_tile
from train.restore.names import find_model
from train.restore.tiles import (
    SMALLEST_TILE,
    OnTile,
    Way,
    as_floats,
    default_tile,
    from_floats,
    restore_batch,
    restore_image,
)

PRECISIONS = {None: None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Tile = int | Literal["auto"] | None


class Restorer:
    """Restores pictures of any size with one model: `Restorer.load("runs/quickstart")(photograph)`.

    network: takes [B, 3, H, W] in [0, 1], sRGB, and has `multiple`, to which it pads. tile: side of its tiles in px,
    where "auto" is asked for. precision: fp32 (None too), bf16 or fp16, of the arithmetic. name: what it is called.
    source: the folder or file it came from, None where it came from none.
    """

    def __init__(
        self,
        network: nn.Module,
        tile: int,
        *,
        precision: str | None = None,
        name: str = "a network",
        source: Path | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            known = ", ".join(key for key in PRECISIONS if key)
            raise ValueError(f"precision {precision}: expected one of {known}")
        self.network, self.tile, self.name, self.source = network.eval(), tile, name, source
        self.precision = PRECISIONS[precision]
        if self.precision == torch.float16 and self.device.type == "cpu":
            raise ValueError("precision fp16: a CPU is slow and imprecise in it: use bf16 or fp32")
        self._fitting: dict[tuple[int, Way], tuple[int, int]] = {}

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        device: str | torch.device | None = None,
        checkpoint: str = "latest",
        precision: str | None = None,
    ) -> Restorer:
        """Load a model by its name (`train.restore.names.find_model`; None: the shipped one) onto a device (None: a GPU
        where there is one). checkpoint: latest, best or step-N of a run. ValueError if it does not load."""
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        network, config, source = load_model(find_model(model), where, checkpoint)
        refuse_oracle(config.model.oracle, source)
        if network.prior is not None:
            network.prior.student.fold()  # its weights rest from now on
        name = f"{model or source.stem}, {describe(source)}" if source.is_dir() else source.stem
        return cls(network, default_tile(config), precision=precision, name=name, source=source)

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return next(self.network.parameters()).device

    def __call__(
        self,
        image: Any,
        strength: float = 1.0,
        tile: Tile = "auto",
        ensemble: bool = False,
        on_tile: OnTile = lambda done, all_: None,
    ) -> Any:
        """Restore a picture, a batch, or a list of pictures: what comes out is of the kind, shape and dtype that went
        in (`train.restore.kinds.unpacked` says what may). The values are sRGB.

        strength: 0 gives the input, 1 what was restored, between them a blend. tile: side of the tiles in px; "auto" is
        the model's own, made smaller where memory is short; None restores the picture whole. ensemble: the mean over
        eight flips and turns. `on_tile(done, all)` is called after each step of a picture's tiles. ValueError for what
        is no picture.
        """
        if isinstance(image, (list, tuple)):
            return [self(each, strength, tile, ensemble, on_tile) for each in image]
        pixels, back = unpacked(image)
        how = {"strength": strength, "tile": tile, "ensemble": ensemble, "on_tile": on_tile}
        if pixels.ndim == 3:
            return back(self.restore(pixels, **how))
        return back(self._restore_stack(pixels, **how))

    def restore(
        self,
        pixels: Tensor,
        *,
        strength: float = 1.0,
        tile: Tile = "auto",
        ensemble: bool = False,
        on_tile: OnTile = lambda done, all_: None,
    ) -> Tensor:
        """Restore RGB pixels [3, H, W], uint8, uint16 or floats in [0, 1], on any device → on the CPU, integers as they
        were, floats as float32."""
        way = self._way(strength, ensemble)
        side, batch = self._tiles(tile, way)
        return restore_image(self.network, pixels, side, on_tile, batch=batch, way=way)

    def _restore_stack(self, stack: Tensor, *, strength: float, tile: Tile, ensemble: bool, on_tile: OnTile) -> Tensor:
        """As `restore`, of a batch [B, 3, H, W]: small pictures go through the network together."""
        way = self._way(strength, ensemble)
        side, batch = self._tiles(tile, way)
        if batch == 1 or (side is not None and max(stack.shape[-2:]) > side):
            return torch.stack(
                [restore_image(self.network, each, side, on_tile, batch=batch, way=way) for each in stack]
            )
        results = []
        for part in stack.split(batch):
            before = as_floats(part.to(self.device))
            after = before + strength * (restore_batch(self.network, before, way) - before)
            results.append(from_floats(after, stack.dtype).cpu())
            on_tile(sum(map(len, results)), len(stack))
        return torch.cat(results)

    def _way(self, strength: float, ensemble: bool) -> Way:
        if not 0 <= strength <= 1:
            raise ValueError(f"strength {strength}: expected 0 (the input) to 1 (what was restored)")
        return Way(self.precision, ensemble, float(strength))

    def _tiles(self, tile: Tile, way: Way) -> tuple[int | None, int]:
        if tile is None:
            return None, 1
        if tile != "auto" and (not isinstance(tile, int) or tile < SMALLEST_TILE):
            raise ValueError(f'tile {tile}: at least {SMALLEST_TILE} px, "auto", or None for the whole picture')
        side = self.tile if tile == "auto" else tile
        key = (side, way._replace(strength=1.0))
        if key not in self._fitting:
            self._fitting[key] = fitting_tile(self.network, *key)
        return self._fitting[key]

    def __repr__(self) -> str:
        return f"Restorer({self.name}, on {self.device})"
