"""The models that a visitor may choose from."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch

from train.checkpoint.saved import describe
from train.log import log
from train.restore.restorer import Restorer, Tile

LOADED = 2  # models in memory at once
SHIPPED = "the model that comes with the program"
WHOLE_MEGAPIXELS = 2.0
TILES = ("auto", "128", "256", "384", "512", "whole picture")


class Models:
    """Models by the names they were given on the command line (None: the shipped one), loaded when they are first
    asked for; the last `LOADED` stay. The first is loaded at once: ValueError where it cannot be."""

    def __init__(
        self,
        names: Sequence[str | None],
        device: torch.device,
        checkpoint: str = "latest",
        precision: str | None = None,
    ) -> None:
        self._names = labelled(names)
        self._how = {"device": device, "checkpoint": checkpoint, "precision": precision}
        self._loaded: OrderedDict[str, Restorer] = OrderedDict()
        self._lock = threading.Lock()
        self._load(self.labels[0])

    @property
    def labels(self) -> list[str]:
        """What they are called on the page."""
        return list(self._names)

    def told(self, label: str) -> str:
        """The label, and the step of a run's checkpoint."""
        source = self.get(label).source
        return f"{label}, {describe(source)}" if source is not None and source.is_dir() else label

    def get(self, label: str) -> Restorer:
        """The model of a label. ValueError for a label that is none, and where it does not load: why is in the log of
        the server alone, for it names places on that machine."""
        with self._lock:
            if label not in self._names:
                raise ValueError(f"{label}: no model of this page")
            if label not in self._loaded:
                try:
                    self._load(label)
                except Exception as error:
                    log.error("%s: does not load: %s", label, error)
                    raise ValueError(f"{label}: this model does not load: choose another one") from None
            self._loaded.move_to_end(label)
            return self._loaded[label]

    def _load(self, label: str) -> None:
        while len(self._loaded) >= LOADED:
            self._loaded.popitem(last=False)
        self._loaded[label] = Restorer.load(self._names[label], **self._how)


def labelled(names: Sequence[str | None]) -> dict[str, str | None]:
    """Names by what the page calls them: no more of a path than tells it from the others, as visitors need not know
    where things lie on the machine that serves."""
    labels: dict[str, str | None] = {}
    for name in dict.fromkeys(names):
        parts, kept = Path(name or SHIPPED).parts, 1
        others = [Path(other or SHIPPED).parts for other in names if other != name]
        while kept < len(parts) and any(other[-kept:] == parts[-kept:] for other in others):
            kept += 1
        labels["/".join(parts[-kept:])] = name
    return labels


def tile_of(choice: str, height: int, width: int) -> Tile:
    """What `Restorer` takes for a choice of `TILES`. ValueError for another one, and for too large a whole picture."""
    if choice not in TILES:
        raise ValueError(f"tile {choice}: expected one of {', '.join(TILES)}")
    if choice == TILES[-1]:
        if height * width > WHOLE_MEGAPIXELS * 1e6:
            raise ValueError(
                f"{width}×{height} px in one piece need much memory: up to {WHOLE_MEGAPIXELS:g} megapixels here; "
                "choose tiles, which have no seams"
            )
        return None
    return choice if choice == "auto" else int(choice)
