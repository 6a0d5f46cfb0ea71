"""Photographs as files: 8 or 16 bit, grey or colour, with or without alpha; EXIF and colour profile stay."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

READABLE = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
WRITABLE = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
SIXTEEN_BIT = (".png", ".tif", ".tiff")
ORIENTATION = 0x0112
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
    """Read a photograph. PictureError if it is missing, of an unknown kind, or does not decode."""
    try:
        with Image.open(path) as image:
            image.load()
            # Pillow has no 16-bit colour: such files are read by OpenCV, all others by Pillow.
            deep = path.suffix.lower() in SIXTEEN_BIT and _is_deep(path)
            exif = image.getexif()
            icc = image.info.get("icc_profile")
            upright = None if deep else ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise PictureError(f"{path}: no such file") from None
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path}: does not decode as a picture ({error})") from None
    orientation = exif.get(ORIENTATION, 1)
    if ORIENTATION in exif:
        exif[ORIENTATION] = 1
    kept = exif.tobytes() if len(exif) else None
    if deep:
        return _from_array(_rotated(_read_deep(path), orientation), icc, kept)
    assert upright is not None
    if upright.mode in ("1", "P", "CMYK", "YCbCr", "LAB", "HSV", "PA", "La", "RGBa", "F"):
        has_alpha = "transparency" in upright.info or upright.mode in ("PA", "La", "RGBa")
        if upright.mode == "CMYK":
            icc = None  # the profile describes inks, not the RGB that is written
        upright = upright.convert("RGBA" if has_alpha else "RGB")
    return _from_array(np.asarray(upright), icc, kept)


def write_picture(path: Path, picture: Picture, *, overwrite: bool = False) -> None:
    """Write a picture in the kind its file name says, whole or not at all. PictureError if the file exists and
    `overwrite` is not set, or cannot be written. JPEG and WebP hold 8 bits; JPEG has no alpha."""
    suffix = path.suffix.lower()
    if suffix not in WRITABLE:
        raise PictureError(f"{path}: unknown kind of picture: use one of {', '.join(WRITABLE)}")
    if path.exists() and not overwrite:
        raise PictureError(f"{path}: exists: choose another name, or --overwrite")
    bits = picture.bits if suffix in SIXTEEN_BIT else 8
    array = _to_array(picture, bits, alpha=suffix not in (".jpg", ".jpeg"))
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=suffix, dir=path.parent)
        os.close(descriptor)
        try:
            _encode(Path(name), array, suffix, picture)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise PictureError(f"{path}: cannot be written: {error.strerror or error}") from None


def _encode(path: Path, array: np.ndarray, suffix: str, picture: Picture) -> None:
    if array.dtype == np.uint16:
        channels = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}.get(array.shape[2] if array.ndim == 3 else 1)
        data = cv2.cvtColor(array, channels) if channels is not None else array
        if not cv2.imwrite(str(path), data):
            raise OSError(f"OpenCV could not write {path.name}")
        return
    extra = {"exif": picture.exif, "icc_profile": picture.icc}
    options = {key: value for key, value in extra.items() if value}
    if suffix in (".jpg", ".jpeg"):
        options |= {"quality": JPEG_QUALITY, "subsampling": 0}
    if suffix == ".webp":
        options |= {"lossless": True}
    Image.fromarray(array).save(path, **options)


def _is_deep(path: Path) -> bool:
    array = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return array is not None and array.dtype == np.uint16


def _read_deep(path: Path) -> np.ndarray:
    """uint16 [H, W], [H, W, 3] RGB or [H, W, 4] RGBA."""
    array = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if array.ndim == 2:
        return array
    return cv2.cvtColor(array, cv2.COLOR_BGR2RGB if array.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)


def _rotated(array: np.ndarray, orientation: int) -> np.ndarray:
    """The array turned upright by its EXIF orientation (1 to 8)."""
    flips = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    if orientation in (5, 6, 7, 8):
        array = np.swapaxes(array, 0, 1)
    return np.ascontiguousarray(np.flip(array, flips) if flips else array)


def _from_array(array: np.ndarray, icc: bytes | None, exif: bytes | None) -> Picture:
    if array.dtype == np.int32:  # Pillow's 16-bit grey ("I")
        array = array.clip(0, 65535).astype(np.uint16)
    bits = 16 if array.dtype == np.uint16 else 8
    channels = 1 if array.ndim == 2 else array.shape[2]
    alpha = np.ascontiguousarray(array[..., -1]) if channels in (2, 4) else None
    colour = array[..., None] if array.ndim == 2 else array[..., : channels - (alpha is not None)]
    rgb = np.repeat(colour, 3, axis=2) if colour.shape[2] == 1 else colour
    scale = np.float32(2**bits - 1)
    return Picture(rgb.astype(np.float32) / scale, bits, colour.shape[2] == 1, alpha, icc, exif)


def _to_array(picture: Picture, bits: int, *, alpha: bool) -> np.ndarray:
    top, kind = 2**bits - 1, np.uint16 if bits == 16 else np.uint8
    rgb = picture.rgb
    if picture.grey:
        rgb = rgb.mean(axis=2, keepdims=True)
    values = np.rint(rgb.clip(0, 1) * top).astype(kind)
    if alpha and picture.alpha is not None:
        plane = picture.alpha if picture.bits == bits else np.rint(picture.alpha / (2**picture.bits - 1) * top)
        values = np.concatenate([values, plane.astype(kind)[..., None]], axis=2)
        if picture.grey and bits == 16:  # OpenCV writes no grey with alpha
            values = values[..., [0, 0, 0, 1]]
    return values[..., 0] if values.shape[2] == 1 else values


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
