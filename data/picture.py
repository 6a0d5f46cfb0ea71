"""Picture files of any kind as stored: grey or colour, 8 or 16 bits, with alpha, profile and Exif, turned upright."""

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import tifffile
from PIL import ExifTags, Image, UnidentifiedImageError

from data.errors import DataError

log = logging.getLogger("sharpprior.data")

ORIENTATION = 0x0112
_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM")  # not those that start other programs
MOST_PIXELS = 2**30
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow refuses above twice that

# Description, make, model, date, artist, copyright; of the Exif block not: embedded notes and sizes of the old picture.
DESCRIPTIVE = (0x010E, 0x010F, 0x0110, 0x0132, 0x013B, 0x8298)
NOT_KEPT = (0x927C, 0xA002, 0xA003, 0xA005)


@dataclass(frozen=True)
class Stored:
    """A picture's pixels: colour [H, W, 1 or 3] and alpha [H, W] or None, both uint8 or both uint16; its ICC profile,
    where that describes these colours; what a camera and its owner wrote (Exif)."""

    colour: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: bytes | None = None


def read_stored(data: bytes, where: str) -> Stored:
    """Read an encoded picture. DataError, naming `where`, if it is of an unknown kind, has several pages, holds other
    than 8 or 16 bits a channel, or does not decode. Exif that does not read is left out, with a warning."""
    try:
        with warnings_alone() as said:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        with image:
            # Phones put a preview or a depth map behind the photograph (MPO): the photograph comes first.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            kind, bits = image.format, _bits(data, image)
            if kind != "TIFF" and bits in (8, 16):
                image.load()  # first: a PNG's Exif may stand behind its pixels, and is no reason to take half of them
            exif = _exif(image, where, said)  # of a TIFF before its pixels: Pillow tells what is damaged once
            orientation = _orientation(image)
            if kind == "TIFF" and bits in (8, 16):
                image.load()
            icc = image.info.get("icc_profile")
            if bits == 8:
                pixels, orientation = image.copy(), _orientation(image)  # Pillow turns TIFFs itself when it loads them
    except Image.DecompressionBombError:
        raise DataError(f"{where}: more than {MOST_PIXELS / 1e6:.0f} million pixels; cut it into parts") from None
    except MemoryError:
        raise
    except Exception as error:  # of many types: Pillow's readers, and those of Exif, check little
        if _is_floating(data):
            raise DataError(f"{where}: {_FLOATING}") from None
        reason = "its kind is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{where}: does not decode as a picture ({reason}); replace the file or leave it out") from None
    if frames > 1:
        raise DataError(f"{where}: has {frames} pages or frames; give a file with one picture")
    if bits not in (8, 16):
        raise DataError(f"{where}: {_FLOATING}")
    if bits == 16:
        return _split(upright_array(_read_deep(data, kind, where), orientation), icc, exif)
    if pixels.mode not in ("L", "LA", "RGB", "RGBA") or "transparency" in pixels.info:
        has_alpha = "transparency" in pixels.info or pixels.mode in ("PA", "La", "RGBa")
        if pixels.mode not in ("RGB", "L", "RGBa", "La"):
            icc = None  # the profile describes inks, Lab or a palette, not the colours that are returned
        grey = pixels.mode in ("1", "L", "La")
        pixels = pixels.convert(("L" if grey else "RGB") + "A" * has_alpha)
    return _split(upright_array(np.asarray(pixels), orientation), icc, exif)


_FLOATING = "floating-point pixels, or more than 16 bits a channel; convert the picture to 8 or 16 bits"


def _is_floating(data: bytes) -> bool:
    """Whether this is a TIFF of a kind of number that Pillow does not open."""
    with contextlib.suppress(Exception), tifffile.TiffFile(io.BytesIO(data)) as file:
        return file.pages[0].dtype not in (np.uint8, np.uint16)
    return False


def _bits(data: bytes, image: Image.Image) -> int:
    """Bits per channel of the file; 32 stands for everything that is neither 8 nor 16 bits of unsigned integers."""
    if image.format == "PNG":
        return 16 if data[24] == 16 else 8
    if image.format == "TIFF":
        tags = image.tag_v2
        if any(each != 1 for each in np.atleast_1d(tags.get(339, 1))):
            return 32
        depth = max(np.atleast_1d(tags.get(258, 1)))
        return 8 if depth <= 8 else int(depth)
    return 32 if image.mode in ("F", "I") else 8


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 where none is recorded, or what is recorded is none."""
    try:
        value = int(image.getexif().get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # of many types: Pillow's reader of Exif checks little; told with what is left out of it
        return 1
    return value if 1 <= value <= 8 else 1


def _exif(image: Image.Image, where: str, opening: list[warnings.WarningMessage]) -> bytes | None:
    """What is kept of a picture's Exif; None, with a warning, where it does not read: the pixels do. opening: what was
    said when the picture was opened, which reads a JPEG's Exif."""
    try:
        with warnings_alone() as said:
            kept, lost = _kept(image.getexif())
            lost = lost or (bool(image.info.get("exif")) and not len(image.getexif()))
    except MemoryError:
        raise
    except Exception as error:
        log.warning("%s: its Exif does not read (%s: %s): it is left out", where, type(error).__name__, error)
        return None
    if lost or any("TiffImagePlugin" in each.filename for each in [*opening, *said]):  # which reads Exif of all kinds
        log.warning("%s: its Exif is damaged: what does not read of it is left out", where)
    return kept


_FILTERS = threading.RLock()  # warnings' filters are the process's: two threads must not put them back crosswise


@contextlib.contextmanager
def warnings_alone() -> Iterator[list[warnings.WarningMessage]]:
    """Gather warnings in a list in place of showing them, one thread after another."""
    with _FILTERS, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield said


def _kept(exif: Image.Exif) -> tuple[bytes | None, bool]:
    """(what a camera and its owner wrote, upright; whether a tag cannot be kept). A TIFF's Exif also holds its layout
    (sizes, strips, compression), which would be false of a new file."""
    tags = {tag: exif[tag] for tag in DESCRIPTIVE if tag in exif}
    blocks = {
        block: {tag: value for tag, value in exif.get_ifd(block).items() if tag not in NOT_KEPT}
        for block in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
    }
    count = len(tags) + sum(map(len, blocks.values()))
    try:
        kept = _written(tags, blocks, ORIENTATION in exif)
    except Exception:  # of many types: a value of a type that its tag does not have
        tags = {tag: value for tag, value in tags.items() if _can_be_written({tag: value}, {})}
        blocks = {
            block: {tag: value for tag, value in values.items() if _can_be_written({}, {block: {tag: value}})}
            for block, values in blocks.items()
        }
        kept = _written(tags, blocks, ORIENTATION in exif)
    return kept, len(tags) + sum(map(len, blocks.values())) < count


def _written(tags: dict, blocks: dict[int, dict], oriented: bool) -> bytes | None:
    kept = Image.Exif()
    kept.update(tags | ({ORIENTATION: 1} if oriented else {}))
    for block, values in blocks.items():
        if values:
            kept.get_ifd(block).update(values)
    return kept.tobytes() if len(kept) or kept.get_ifd(ExifTags.IFD.Exif) else None


def _can_be_written(tags: dict, blocks: dict[int, dict]) -> bool:
    try:
        _written(tags, blocks, oriented=False)
    except MemoryError:
        raise
    except Exception:
        return False
    return True


def _read_deep(data: bytes, kind: str | None, where: str) -> np.ndarray:
    """uint16 [H, W], [H, W, 3] RGB or [H, W, 4] RGBA, as stored. DataError if it does not decode."""
    array = None
    if kind == "TIFF":
        try:
            array = _deep_tiff(data, where)
        except DataError:
            raise
        except Exception:  # of many types: compressions that it does not know are OpenCV's to read
            array = None
        if array is not None and (array.ndim > 3 or (array.ndim == 3 and array.shape[2] not in (2, 3, 4))):
            raise DataError(f"{where}: has {array.shape} samples; give one grey, RGB or RGBA picture")
    if array is None:
        with contextlib.suppress(cv2.error):
            array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
        if array is not None and array.ndim == 3:
            array = cv2.cvtColor(array, cv2.COLOR_BGR2RGB if array.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    if array is None or array.dtype != np.uint16:
        raise DataError(f"{where}: its 16-bit pixels do not decode; save it as PNG or uncompressed TIFF")
    return array


def _deep_tiff(data: bytes, where: str) -> np.ndarray:
    """A 16-bit TIFF's pixels, [H, W] or [H, W, 2 to 4], white on high values and alpha last, not multiplied in."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        array, kind = page.asarray(), tifffile.PHOTOMETRIC(int(page.photometric)).name
        if int(page.planarconfig) == 2 and array.ndim == 3:
            array = np.moveaxis(array, 0, -1)
        if kind not in ("MINISBLACK", "MINISWHITE", "RGB"):
            raise DataError(f"{where}: a 16-bit TIFF of {kind.lower()} colours; convert it to grey or RGB")
        extra = [int(each) for each in page.extrasamples]
    colours = 3 if kind == "RGB" else 1
    if array.dtype != np.uint16 or array.ndim != 2 + (colours + len(extra) > 1):
        return array
    if kind == "MINISWHITE":
        array = array.copy()
        colour = array if array.ndim == 2 else array[..., :1]
        colour[...] = 65535 - colour
    if array.ndim == 3 and array.shape[2] > colours:
        alpha = array[..., colours : colours + 1]
        if extra[0] == 1:  # multiplied in
            colour = np.rint(array[..., :colours] * (65535.0 / np.maximum(alpha, 1)))
            array = np.concatenate([np.minimum(colour, 65535).astype(np.uint16), alpha], axis=2)
        array = array[..., : colours + (extra[0] in (1, 2))]  # others are unspecified: no opacity
        array = array[..., 0] if array.shape[2] == 1 else array
    return array


def upright_array(array: np.ndarray, orientation: int) -> np.ndarray:
    """A picture [H, W, …] turned upright by its EXIF orientation (1 to 8)."""
    flips = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    if orientation in (5, 6, 7, 8):
        array = np.swapaxes(array, 0, 1)
    return np.ascontiguousarray(np.flip(array, flips) if flips else array)


def _split(array: np.ndarray, icc: bytes | None, exif: bytes | None) -> Stored:
    channels = 1 if array.ndim == 2 else array.shape[2]
    alpha = np.ascontiguousarray(array[..., -1]) if channels in (2, 4) else None
    colour = array[..., None] if array.ndim == 2 else array[..., : channels - (alpha is not None)]
    return Stored(colour, alpha, icc, exif)
