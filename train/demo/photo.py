"""A visitor's photograph: restored once, blended and written as often as the strength is moved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from data.files import write_atomically
from train.restore.files import How, restore_picture
from train.restore.picture import WRITABLE, Picture, PictureError, encode, read_picture
from train.restore.restorer import Restorer, Tile

SHOWN = 2048  # px of the longer side on the page; the file that is downloaded has all


@dataclass
class Photo:
    """A photograph and what the model made of it at full strength.

    before, after: [H, W, 1 or 3] of the file's own 8 or 16 bits, on the disk, so that many visitors need little memory;
    picture: what else the file holds (alpha, profile, Exif), without pixels; seconds: of restoring.
    """

    name: str
    before: np.ndarray
    after: np.ndarray
    picture: Picture
    seconds: float

    def blended(self, strength: float) -> np.ndarray:
        """The photograph (0), what was restored (1), or between them, of its own integers."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength {strength}: expected 0 (the photograph) to 1 (what was restored)")
        before = self.before.astype(np.float32)
        return np.rint(before + np.float32(strength) * (self.after - before)).astype(self.before.dtype)

    def shown(self, strength: float) -> tuple[np.ndarray, np.ndarray]:
        """(before, blended) as uint8 RGB for the page, made smaller where they are larger than `SHOWN`."""
        return for_page(np.asarray(self.before)), for_page(self.blended(strength))

    def write(self, folder: Path, strength: float) -> Path:
        """Write the blended picture as a file of the same kind (a .bmp as .png) into the folder; its path."""
        name = Path(self.name)
        suffix = name.suffix if name.suffix.lower() in WRITABLE else ".png"
        path = folder / f"{name.stem}_restored{suffix}"
        blended = replace(self.picture, colour=self.blended(strength))
        data = encode(blended, suffix, path.name)  # visitors need not know where files lie on the machine that serves
        try:
            write_atomically(path, data, durable=False)
        except OSError as error:
            raise PictureError(f"{path.name}: cannot be written: {error.strerror or type(error).__name__}") from None
        return path


def restore_photo(
    restorer: Restorer,
    path: Path,
    folder: Path,
    *,
    tile: Tile = "auto",
    ensemble: bool = False,
    on_tile: Callable[[int, int], None] = lambda done, all_: None,
) -> Photo:
    """Restore a file that was uploaded; its pixels are kept in the folder. PictureError for what cannot be read."""
    picture = read_picture(path, where=path.name)
    began = time.perf_counter()
    restored = restore_picture(restorer, picture, How(tile=tile, ensemble=ensemble), on_tile)
    seconds = time.perf_counter() - began
    before, after = (_on_disk(folder / f"{n}.npy", p.colour) for n, p in (("before", picture), ("after", restored)))
    return Photo(path.name, before, after, replace(picture, colour=before[:0, :0]), seconds)


def for_page(image: np.ndarray, side: int = SHOWN) -> np.ndarray:
    """uint8 RGB [H, W, 3] of [H, W, 1 or 3] of 8 or 16 bits, by area averaging at most `side` px long."""
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if image.shape[2] == 1:
        image = np.repeat(image, 3, axis=2)
    height, width = image.shape[:2]
    if max(height, width) <= side:
        return image
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA)


def _on_disk(path: Path, array: np.ndarray) -> np.ndarray:
    path.unlink(missing_ok=True)  # an older photograph may still be mapped: it keeps the file that it has
    np.save(path, array)
    return np.load(path, mmap_mode="r")
