"""What the demo does when something on its page is pressed: plain values in, plain values out, no gradio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.image import decode_image
from train.demo import play, words
from train.demo.examples import Example
from train.demo.limits import Limits
from train.demo.models import Models, tile_of
from train.demo.photo import for_page, restore_photo
from train.demo.visit import Visit

Two = tuple[np.ndarray, np.ndarray]
OnTile = Callable[[int, int], None]


def quiet(done: int, every: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class How:
    """The choices of a visitor: model and tile as they are called on the page, and self-ensemble."""

    model: str
    tile: str = "auto"
    ensemble: bool = False


@dataclass(frozen=True)
class Played:
    """Results of the playground: kernel (uint8 [S, S]), sharp, blurry and restored (uint8 RGB), words (HTML)."""

    kernel: np.ndarray
    sharp: np.ndarray
    blurry: np.ndarray
    restored: np.ndarray
    words: str


class Acts:
    """The demo's acts with its models and limits; `root`: the folder in which visitors have theirs. What a visitor got
    wrong is a ValueError with words for the page."""

    def __init__(self, models: Models, limits: Limits, root: Path) -> None:
        self.models, self.limits, self.root = models, limits, root

    def restore(
        self, path: Path, strength: float, how: How, visit: Visit | None, on_tile: OnTile = quiet
    ) -> tuple[Two, str, Path, Visit]:
        """Restore an uploaded file: (before and after for the page, words, file to download, visit)."""
        return self._restore(path, None, strength, how, visit, on_tile)

    def restore_example(
        self, example: Example, strength: float, how: How, visit: Visit | None, on_tile: OnTile = quiet
    ) -> tuple[Two, str, Path, Visit]:
        """As `restore`, of a photograph whose sharp original is known, with scores."""
        visit = visit or Visit.begin(self.root)
        path = visit.folder / "example.png"
        Image.fromarray(example.blurry).save(path)
        return self._restore(path, example.sharp, strength, how, visit, on_tile)

    def _restore(
        self, path: Path, truth: np.ndarray | None, strength: float, how: How, visit: Visit | None, on_tile: OnTile
    ) -> tuple[Two, str, Path, Visit]:
        width, height = self.limits.check(path)
        restorer, tile = self.models.get(how.model), tile_of(how.tile, height, width)
        visit = visit or Visit.begin(self.root)
        visit.photo = restore_photo(restorer, path, visit.folder, tile=tile, ensemble=how.ensemble, on_tile=on_tile)
        visit.truth = truth
        tiles = "one piece" if tile is None else f"tiles of at most {restorer.tile if tile == 'auto' else tile} px"
        told = words.said_of_photo(
            visit.photo, self.models.told(how.model), tiles + (", eight ways" if how.ensemble else "")
        )
        pictures, score, file = self.blend(strength, visit)
        return pictures, told + score, file, visit

    def blend(self, strength: float, visit: Visit) -> tuple[Two, str, Path]:
        """The photograph of the visit at another strength: (before and after, score, file to download)."""
        if visit.photo is None:
            raise ValueError("restore a photograph first")
        pictures = visit.photo.shown(strength)
        score = words.unknown_truth()
        if visit.truth is not None:
            score = words.scoreboard(play.scored(visit.truth, *pictures, None))
        return pictures, score, visit.photo.write(visit.folder, strength)

    def own_sharp(self, path: Path) -> np.ndarray:
        """A visitor's sharp photograph for the playground: its middle square."""
        self.limits.check(path)
        return play.squared(decode_image(path.read_bytes(), path.name))

    def play(
        self, sharp: np.ndarray, points: Any, extent: float, noise: float, how: How, on_tile: OnTile = quiet
    ) -> Played:
        """Blur a sharp photograph along a path, restore it, and score what came out."""
        if not 0 <= noise <= 10:
            raise ValueError(f"noise {noise:g}: 0 to 10")
        kernel = play.kernel_of(points, extent)
        restorer, tile = self.models.get(how.model), tile_of(how.tile, *sharp.shape[:2])
        blurry = play.blur(sharp, kernel, noise)
        restored = restorer(blurry, tile=tile, ensemble=how.ensemble, on_tile=on_tile)
        told = words.scoreboard(play.scored(sharp, blurry, restored, kernel))
        facts = f'<p class="facts">Motion over {play.severity(extent)}.</p>'
        return Played(play.kernel_picture(kernel), for_page(sharp), blurry, restored, facts + told)
