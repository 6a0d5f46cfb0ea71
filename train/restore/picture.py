"""Photographs as files: 8 or 16 bit, grey or colour, with or without alpha; EXIF and colour profile stay."""

from __future__ import annotations

import contextlib
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data.files import replacing

READABLE = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
WRITABLE = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
SIXTEEN_BIT = (".png", ".tif", ".tiff")
ORIENTATION, ICC_TAG = 0x0112, 34675

# Description, make, model, date, artist, copyright; of the Exif block not: embedded notes and sizes of the old picture.
DESCRIPTIVE = (0x010E, 0x010F, 0x0110, 0x0132, 0x013B, 0x8298)
NOT_KEPT = (0x927C, 0xA002, 0xA003, 0xA005)
MOST_PIXELS = 2**30
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow refuses above twice that
JPEG_QUALITY = 97


class PictureError(ValueError):
    """A picture file that cannot be read or written; the message is one line for the user."""


@dataclass
class Picture:
    """rgb: float32 [H, W, 3] in [0, 1], upright, in the file's own colour space (sRGB unless icc says otherwise).

    alpha: [H, W] of the file's integer type, or None. bits: 8 or 16 per channel of the file. grey: one colour channel.
    """

    rgb: np.ndarray
    bits: int = 8
    grey: bool = False
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: bytes | None = None


def read_picture(path: Path) -> Picture:
    """Read a photograph. PictureError if it is missing, of an unknown kind, has several pages, or does not decode."""
    try:
        # From an open file: Pillow maps a named grey TIFF into memory and forgets to turn it upright then.
        with open(path, "rb") as file, Image.open(file) as image:
            frames = getattr(image, "n_frames", 1)
            kind, bits = image.format, _bits(path, image)
            orientation = image.getexif().get(ORIENTATION, 1)  # a TIFF's is gone once it is loaded
            image.load()
            exif, icc = image.getexif(), image.info.get("icc_profile")
            upright = None if bits == 16 else ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise PictureError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise PictureError(f"{path}: more than {MOST_PIXELS / 1e6:.0f} million pixels: cut it into parts") from None
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, EOFError) as error:
        raise PictureError(f"{path}: does not decode as a picture ({error})") from None
    if frames > 1:
        raise PictureError(f"{path}: has {frames} pages or frames: give a file with one picture")
    if bits not in (8, 16):
        raise PictureError(f"{path}: has {bits} bits or floating-point values a channel: convert it to 8 or 16 bits")
    if bits == 16:
        array = _rotated(_read_deep(path, kind), orientation)
        return _from_array(array, icc, _kept(exif))
    assert upright is not None
    if upright.mode not in ("L", "LA", "RGB", "RGBA") or "transparency" in upright.info:
        has_alpha = "transparency" in upright.info or upright.mode in ("PA", "La", "RGBa")
        if upright.mode not in ("RGB", "L", "RGBa", "La"):
            icc = None  # the profile describes inks, Lab or a palette, not the colours that are written
        grey = upright.mode in ("1", "L", "La")
        upright = upright.convert(("L" if grey else "RGB") + "A" * has_alpha)
    return _from_array(np.asarray(upright), icc, _kept(exif))


def _bits(path: Path, image: Image.Image) -> int:
    """Bits per channel of the file; 32 stands for everything that is neither 8 nor 16 bits of unsigned integers."""
    if image.format == "PNG":
        with open(path, "rb") as file:
            return 16 if file.read(25)[24] == 16 else 8
    if image.format == "TIFF":
        tags = image.tag_v2
        if any(each != 1 for each in np.atleast_1d(tags.get(339, 1))):
            return 32
        depth = max(np.atleast_1d(tags.get(258, 1)))
        return 8 if depth <= 8 else int(depth)
    return 32 if image.mode in ("F", "I") else 8


def _kept(exif: Image.Exif) -> bytes | None:
    """What a camera and its owner wrote, upright. A TIFF's Exif also holds its layout (sizes, strips, compression),
    which would be false of the new file."""
    kept = Image.Exif()
    for tag in DESCRIPTIVE:
        if tag in exif:
            kept[tag] = exif[tag]
    for block in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        values = exif.get_ifd(block)
        if values:
            kept.get_ifd(block).update({tag: value for tag, value in values.items() if tag not in NOT_KEPT})
    if ORIENTATION in exif:
        kept[ORIENTATION] = 1
    return kept.tobytes() if len(kept) or kept.get_ifd(ExifTags.IFD.Exif) else None


def write_picture(path: Path, picture: Picture, *, overwrite: bool = False) -> None:
    """Write a picture in the kind its file name says, whole or not at all. PictureError if the file exists and
    `overwrite` is not set, or cannot be written. JPEG and WebP hold 8 bits; JPEG has no alpha."""
    check_target(path, overwrite=overwrite)
    suffix = path.suffix.lower()
    bits = picture.bits if suffix in SIXTEEN_BIT else 8
    array = _to_array(picture, bits, alpha=suffix not in (".jpg", ".jpeg"), spread=suffix == ".png")
    try:
        with replacing(path, durable=False) as temporary:
            _encode(temporary, array, suffix, picture)
    except OSError as error:
        raise PictureError(f"{path}: cannot be written: {error.strerror or error}") from None


def check_target(path: Path, *, overwrite: bool) -> None:
    """PictureError if a picture cannot be written there: unknown kind, no such folder, or a file that exists."""
    if path.suffix.lower() not in WRITABLE:
        raise PictureError(f"{path}: unknown kind of picture: use one of {', '.join(WRITABLE)}")
    if not path.parent.is_dir():
        raise PictureError(f"{path}: there is no folder {path.parent}: make it first")
    if path.exists() and not overwrite:
        raise PictureError(f"{path}: exists: choose another name, or --overwrite")


def _encode(path: Path, array: np.ndarray, suffix: str, picture: Picture) -> None:
    if array.dtype == np.uint16 and suffix == ".png":
        return _encode_deep_png(path, array, picture)
    if array.dtype == np.uint16:
        return _encode_deep_tiff(path, array, picture)
    extra = {"exif": picture.exif, "icc_profile": picture.icc}
    options = {key: value for key, value in extra.items() if value}
    if suffix in (".jpg", ".jpeg"):
        options |= {"quality": JPEG_QUALITY, "subsampling": 0}
    if suffix == ".webp":
        options |= {"lossless": True}
    if suffix in (".tif", ".tiff"):
        options |= {"compression": "tiff_deflate"}
    Image.fromarray(array).save(path, format=Image.registered_extensions()[suffix], **options)


def _encode_deep_png(path: Path, array: np.ndarray, picture: Picture) -> None:
    """16-bit PNG by OpenCV, then the chunks that it does not write, put before the pixels."""
    code = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}.get(array.shape[2] if array.ndim == 3 else 1)
    done, encoded = cv2.imencode(".png", array if code is None else cv2.cvtColor(array, code))
    if not done:
        raise OSError(f"OpenCV could not encode {path.name}")
    data = encoded.tobytes()
    chunks = b""
    if picture.icc:
        chunks += _png_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc))
    if picture.exif:
        chunks += _png_chunk(b"eXIf", picture.exif.removeprefix(b"Exif\0\0"))
    header = 8 + 25  # signature, IHDR
    path.write_bytes(data[:header] + chunks + data[header:])


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _encode_deep_tiff(path: Path, array: np.ndarray, picture: Picture) -> None:
    tags: list[tuple] = [(ICC_TAG, 7, len(picture.icc), picture.icc, True)] if picture.icc else []
    if picture.exif:
        exif = Image.Exif()
        exif.load(picture.exif)
        tags += [(tag, 2, 0, str(exif[tag]), True) for tag in DESCRIPTIVE if tag in exif]
    channels = 1 if array.ndim == 2 else array.shape[2]
    layout = {
        "photometric": "minisblack" if channels < 3 else "rgb",
        "extrasamples": ["unassalpha"] if channels in (2, 4) else None,
        "planarconfig": "contig" if array.ndim == 3 else None,
    }
    tifffile.imwrite(path, array, **layout, compression="zlib", metadata=None, extratags=tags)


def _read_deep(path: Path, kind: str | None) -> np.ndarray:
    """uint16 [H, W], [H, W, 3] RGB or [H, W, 4] RGBA, as stored. PictureError if it does not decode."""
    array = None
    if kind == "TIFF":
        with contextlib.suppress(Exception):  # compressions that it does not know are OpenCV's to read
            array = tifffile.imread(path)
        if array is not None and (array.ndim > 3 or (array.ndim == 3 and array.shape[2] not in (2, 3, 4))):
            raise PictureError(f"{path}: has {array.shape} samples: give one grey, RGB or RGBA picture")
    if array is None:
        array = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if array is not None and array.ndim == 3:
            array = cv2.cvtColor(array, cv2.COLOR_BGR2RGB if array.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    if array is None or array.dtype != np.uint16:
        raise PictureError(f"{path}: its 16-bit pixels do not decode: save it as PNG or uncompressed TIFF")
    return array


def _rotated(array: np.ndarray, orientation: int) -> np.ndarray:
    """The array turned upright by its EXIF orientation (1 to 8)."""
    flips = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    if orientation in (5, 6, 7, 8):
        array = np.swapaxes(array, 0, 1)
    return np.ascontiguousarray(np.flip(array, flips) if flips else array)


def _from_array(array: np.ndarray, icc: bytes | None, exif: bytes | None) -> Picture:
    bits = 16 if array.dtype == np.uint16 else 8
    channels = 1 if array.ndim == 2 else array.shape[2]
    alpha = np.ascontiguousarray(array[..., -1]) if channels in (2, 4) else None
    colour = array[..., None] if array.ndim == 2 else array[..., : channels - (alpha is not None)]
    rgb = np.repeat(colour, 3, axis=2) if colour.shape[2] == 1 else colour
    scale = np.float32(2**bits - 1)
    return Picture(rgb.astype(np.float32) / scale, bits, colour.shape[2] == 1, alpha, icc, exif)


def _to_array(picture: Picture, bits: int, *, alpha: bool, spread: bool) -> np.ndarray:
    top, kind = 2**bits - 1, np.uint16 if bits == 16 else np.uint8
    rgb = picture.rgb
    if picture.grey:
        rgb = rgb.mean(axis=2, keepdims=True)
    values = np.rint(rgb.clip(0, 1) * top).astype(kind)
    if alpha and picture.alpha is not None:
        plane = picture.alpha if picture.bits == bits else np.rint(picture.alpha / (2**picture.bits - 1) * top)
        values = np.concatenate([values, plane.astype(kind)[..., None]], axis=2)
        if picture.grey and bits == 16 and spread:  # OpenCV writes no grey with alpha
            values = values[..., [0, 0, 0, 1]]
    return values[..., 0] if values.shape[2] == 1 else values
