"""Photographs as files: 8 or 16 bit, grey or colour, with or without alpha; EXIF and colour profile stay."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image

from data.errors import DataError
from data.files import replacing
from data.picture import DESCRIPTIVE, read_stored

READABLE = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
WRITABLE = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
SIXTEEN_BIT = (".png", ".tif", ".tiff")
ICC_TAG = 34675

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
    """Read a photograph. PictureError if it is missing or cannot be read (`data.picture`)."""
    try:
        stored = read_stored(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise PictureError(f"{path}: no such file") from None
    except OSError as error:
        raise PictureError(f"{path}: {error.strerror or error}") from None
    except DataError as error:
        raise PictureError(str(error)) from None
    colour, bits = stored.colour, 16 if stored.colour.dtype == np.uint16 else 8
    grey = colour.shape[2] == 1
    rgb = (np.repeat(colour, 3, axis=2) if grey else colour).astype(np.float32) / np.float32(2**bits - 1)
    return Picture(rgb, bits, grey, stored.alpha, stored.icc, stored.exif)


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
    """PictureError if a picture cannot be written there: unknown kind, or a file that exists."""
    if path.suffix.lower() not in WRITABLE:
        raise PictureError(f"{path}: unknown kind of picture: use one of {', '.join(WRITABLE)}")
    if path.exists() and not overwrite:
        raise PictureError(
            f"{path}: exists: choose another name, --overwrite, or --skip-existing to go on with a folder"
        )


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
