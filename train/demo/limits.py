"""What a visitor may ask of the demo, checked before anything large is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tifffile
from PIL import Image

from train.restore.picture import READABLE, PictureError


@dataclass(frozen=True)
class Limits:
    """megabytes: of an uploaded file; megapixels: of its picture; waiting: visitors in the queue, beside the one who is
    served; minutes: how long a visitor's files are kept. ValueError where one is not above 0."""

    megabytes: float = 50.0
    megapixels: float = 25.0
    waiting: int = 16
    minutes: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"--{name} {value}: give a number above 0")

    def check(self, path: Path) -> tuple[int, int]:
        """Width and height in px of a picture file, which is not decoded. PictureError for a file that is too large, of
        a kind that is not read, or whose picture is too large."""
        if path.suffix.lower() not in READABLE:
            raise PictureError(f"{path.name}: give a picture ({', '.join(READABLE)})")
        size = path.stat().st_size / 1e6
        if size > self.megabytes:
            raise PictureError(f"{path.name}: {size:.1f} MB: at most {self.megabytes:g} MB here")
        width, height = _extent(path)
        if width * height > self.megapixels * 1e6:
            raise PictureError(
                f"{path.name}: {width}×{height} px are {width * height / 1e6:.1f} megapixels: at most "
                f"{self.megapixels:g} here; `sharpprior restore` on your own machine takes any size"
            )
        return width, height


def _extent(path: Path) -> tuple[int, int]:
    """Width and height in px of a picture file, from its header. PictureError where it has none that is known."""
    try:
        with Image.open(path) as image:
            return image.size
    except Image.DecompressionBombError:
        raise PictureError(f"{path.name}: far too many pixels: at most a few megapixels here") from None
    except Exception:  # of many types; their words name the file's place on this machine
        try:
            with tifffile.TiffFile(path) as file:
                page = file.pages[0]
                return page.imagewidth, page.imagelength
        except Exception:  # of many types, for what is no TIFF
            raise PictureError(f"{path.name}: is no picture that can be read") from None
