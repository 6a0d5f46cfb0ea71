"""Photographs as files: 8 or 16 bit, grey or colour, with or without alpha; EXIF and colour profile stay."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from data.errors import DataError
from data.files import write_atomically
from data.picture import read_stored, warnings_alone
from train.restore.tiff import encode_tiff

log = logging.getLogger("sharpprior")

READABLE = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
WRITABLE = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
KINDS = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "TIFF": ".tif", "WEBP": ".webp"}
SIXTEEN_BIT = (".png", ".tif", ".tiff")

JPEG_QUALITY = 97
MOST_PIXELS = 256_000_000  # unless more is allowed: the largest cameras have 200 megapixels


class PictureError(ValueError):
    """A picture file that cannot be read or written; the message is one line for the user."""


@dataclass
class Picture:
    """colour: uint8 or uint16 [H, W, 1 or 3], upright, in the file's own colour space (sRGB unless icc says otherwise).

    alpha: [H, W] of the same type, or None. kind: the suffix of the file's format, `.png` where that is not written.
    """

    colour: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    kind: str = ".png"


def read_picture(path: Path, most: int = MOST_PIXELS, where: str | None = None) -> Picture:
    """Read a photograph. PictureError, naming the path or `where`, if it is missing, has more than `most` pixels, or
    cannot be read (`data.picture`)."""
    where = where or str(path)
    try:
        if path.exists() and not path.is_file():  # a named pipe would be waited for
            raise PictureError(f"{where}: is no file, but a folder, a pipe or a device")
        return decode(path.read_bytes(), where, most)
    except FileNotFoundError:
        raise PictureError(f"{where}: no such file") from None
    except OSError as error:
        raise PictureError(f"{where}: {error.strerror or type(error).__name__}") from None


def decode(data: bytes, where: str, most: int = MOST_PIXELS) -> Picture:
    """The picture in a file's bytes; as `read_picture`."""
    if not data:
        raise PictureError(f"{where}: the file is empty; replace it or leave it out")
    kind, width, height = _header(data)
    if width * height > most:
        raise PictureError(
            f"{where}: {width}×{height} px, more than {most / 1e6:g} megapixels: cut it into parts, or allow more"
        )
    try:
        stored = read_stored(data, where)
    except DataError as error:
        raise PictureError(str(error)) from None
    except MemoryError:
        raise PictureError(f"{where}: there is not enough memory for it; cut it into parts") from None
    except Exception as error:
        raise PictureError(f"{where}: does not decode as a picture ({one_line(error)})") from None
    return Picture(stored.colour, stored.alpha, stored.icc, stored.exif, kind)


def _header(data: bytes) -> tuple[str, int, int]:
    """(suffix, width, height) that the file's first bytes say; of what is no picture, nothing."""
    try:
        with warnings_alone(), Image.open(io.BytesIO(data)) as image:
            return KINDS.get(image.format or "", ".png"), *image.size
    except Exception:  # of many types; what is wrong with it is told when it is decoded
        return ".png", 0, 0


def write_picture(path: Path, picture: Picture, *, overwrite: bool = False) -> None:
    """Write a picture in the kind its file name says, whole or not at all. PictureError if the file exists and
    `overwrite` is not set, or cannot be written. JPEG and WebP hold 8 bits; JPEG has no alpha."""
    check_target(path, overwrite=overwrite)
    data = encode(picture, path.suffix, str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, durable=False)
    except OSError as error:
        raise PictureError(f"{path}: cannot be written: {error.strerror or error}") from None


def encode(picture: Picture, suffix: str, where: str) -> bytes:
    """The bytes of a file of this kind. PictureError where it cannot hold the picture (a side too long for JPEG); Exif
    that it cannot hold is left out, with a warning."""
    suffix = suffix.lower()
    deep = picture.colour.dtype == np.uint16 and suffix in SIXTEEN_BIT
    array = _to_array(picture, deep, alpha=suffix not in (".jpg", ".jpeg"), spread=suffix == ".png")
    try:
        if suffix in (".tif", ".tiff"):
            return encode_tiff(array, picture.icc, picture.exif)
        return _deep_png(array, picture) if deep else _plain(array, suffix, picture)
    except Exception as error:  # of many types, for odd Exif too
        if picture.exif is not None:
            data = encode(replace(picture, exif=None), suffix, where)  # where that fails too, that is what is told
            log.warning("%s: its Exif cannot be written (%s): it is left out", where, one_line(error))
            return data
        raise PictureError(f"{where}: cannot be written: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """What an error says, with its type, for a library's words alone may be none."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def check_target(path: Path, *, overwrite: bool) -> None:
    """PictureError if a picture cannot be written there: unknown kind, or a file that exists."""
    if path.suffix.lower() not in WRITABLE:
        raise PictureError(f"{path}: unknown kind of picture: use one of {', '.join(WRITABLE)}")
    if path.exists() and not overwrite:
        raise PictureError(
            f"{path}: exists: choose another name, --overwrite, or --skip-existing to go on with a folder"
        )


def _plain(array: np.ndarray, suffix: str, picture: Picture) -> bytes:
    extra = {"exif": picture.exif, "icc_profile": picture.icc}
    options = {key: value for key, value in extra.items() if value}
    if suffix in (".jpg", ".jpeg"):
        options |= {"quality": JPEG_QUALITY, "subsampling": 0}
    if suffix == ".webp":
        options |= {"lossless": True}
    file = io.BytesIO()
    Image.fromarray(array).save(file, format=Image.registered_extensions()[suffix], **options)
    return file.getvalue()


def _deep_png(array: np.ndarray, picture: Picture) -> bytes:
    """16-bit PNG by OpenCV, then the chunks that it does not write, put before the pixels."""
    code = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}.get(array.shape[2] if array.ndim == 3 else 1)
    done, encoded = cv2.imencode(".png", array if code is None else cv2.cvtColor(array, code))
    if not done:
        raise OSError("OpenCV could not encode it")
    data = encoded.tobytes()
    chunks = b""
    if picture.icc:
        chunks += _png_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc))
    if picture.exif:
        chunks += _png_chunk(b"eXIf", picture.exif.removeprefix(b"Exif\0\0"))
    header = 8 + 25  # signature, IHDR
    return data[:header] + chunks + data[header:]


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _to_array(picture: Picture, deep: bool, *, alpha: bool, spread: bool) -> np.ndarray:
    """[H, W] or [H, W, 2 to 4] of 16 bits (`deep`) or 8; alpha where it is wanted."""
    planes = [picture.colour] + ([picture.alpha[..., None]] if alpha and picture.alpha is not None else [])
    if not deep and picture.colour.dtype == np.uint16:
        planes = [((plane.astype(np.uint32) + 128) // 257).astype(np.uint8) for plane in planes]
    values = np.concatenate(planes, axis=2) if len(planes) > 1 else planes[0]
    if values.shape[2] == 2 and deep and spread:  # OpenCV writes no grey with alpha
        values = values[..., [0, 0, 0, 1]]
    return values[..., 0] if values.shape[2] == 1 else values
