"""TIFF files of 8 and 16 bits with what a camera wrote: Pillow (12.3) fails at compressed ones with an Exif block,
tifffile writes no such block."""

from __future__ import annotations

import io
import struct

import numpy as np
import tifffile
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from data.picture import DESCRIPTIVE

ICC_TAG = 34675
BLOCKS = (int(ExifTags.IFD.Exif), int(ExifTags.IFD.GPSInfo))


def encode_tiff(array: np.ndarray, icc: bytes | None, exif: bytes | None) -> bytes:
    """A TIFF of uint8 or uint16 [H, W] or [H, W, 2 to 4], compressed without loss. icc: its profile; exif: a block as
    in JPEG. ValueError or struct.error for what four-byte offsets do not reach, and for values that are none."""
    tags: list[tuple] = [(ICC_TAG, 7, len(icc), icc, True)] if icc else []
    held = Image.Exif()
    if exif:
        held.load(exif)
    tags += [(tag, 2, 0, str(held[tag]), True) for tag in DESCRIPTIVE if tag in held]
    channels = 1 if array.ndim == 2 else array.shape[2]
    layout = {
        "photometric": "minisblack" if channels < 3 else "rgb",
        "extrasamples": ["unassalpha"] if channels in (2, 4) else None,
        "planarconfig": "contig" if array.ndim == 3 else None,
    }
    blocks = {block: values for block in BLOCKS if (values := held.get_ifd(block))}
    file = io.BytesIO()
    small = {"bigtiff": False} if blocks else {}
    tifffile.imwrite(file, array, **layout, **small, byteorder="<", compression="zlib", metadata=None, extratags=tags)
    if blocks:
        _append(file, blocks)
    return file.getvalue()


def _append(file: io.BytesIO, blocks: dict[int, dict]) -> None:
    """Put blocks behind a TIFF of one page, and a longer copy of its directory that names them (TIFF 6.0, section 2:
    entries of 12 bytes, by tag, whose offsets count from the file's beginning)."""
    data = file.getbuffer()
    (first,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, first)
    entries = [bytes(data[at : at + 12]) for at in range(first + 2, first + 2 + 12 * count, 12)]
    data.release()  # else the file could not grow
    for block, values in blocks.items():
        directory = ImageFileDirectory_v2(group=block)
        for tag, value in values.items():
            directory[tag] = value
        place = _even_end(file)
        file.write(directory.tobytes(place))
        entries.append(struct.pack("<HHII", block, 4, 1, place))
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry)[0])
    place = _even_end(file)
    file.write(struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0))
    file.seek(4)
    file.write(struct.pack("<I", place))


def _even_end(file: io.BytesIO) -> int:
    """The end of the file, made even: directories begin on words."""
    end = file.seek(0, io.SEEK_END)
    return end + file.write(b"\0" * (end % 2))
