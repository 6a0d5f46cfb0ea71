"""Images as the whole of data/ sees them: RGB uint8 [H, W, 3], whatever the file held.

The rule for other forms: grey is copied to three channels; 16 bit becomes 8 by round(v / 257); alpha is composited over
white (what a viewer shows); EXIF orientation is applied. Floating-point pixels are refused.
"""

import io
import math
import struct

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from data.errors import DataError
from data.picture import ORIENTATION, Stored, read_stored, upright_array

LARGEST_SIDE = 1 << 20  # px: more is no picture but damage
_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def exif_orientation(data: bytes) -> int:
    """EXIF orientation 1..8 of an encoded image, of its XMP where that alone has one; 1 where none is recorded."""
    # JPEG keeps both in the first segments, PNG and WebP in chunks that may come last (and be compressed: XML:com…).
    head = data[:65536] if data[:2] == b"\xff\xd8" else data
    if not any(mark in head for mark in (b"Exif", b"eXIf", b"exif", b"tiff:Orientation", b"XML:com.adobe.xmp")):
        return 1
    try:
        with Image.open(io.BytesIO(data)) as image:
            value = int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        return 1
    return value if 1 <= value <= 8 else 1


def _rgb_u8(stored: Stored) -> np.ndarray:
    """RGB uint8 [H, W, 3] of a picture's stored pixels."""
    colour, alpha = (None if each is None else _eight_bit(each) for each in (stored.colour, stored.alpha))
    rgb = np.repeat(colour, 3, axis=2) if colour.shape[2] == 1 else np.ascontiguousarray(colour)
    if alpha is None:
        return rgb
    rgb, alpha = rgb.astype(np.uint32), alpha[..., None].astype(np.uint32)
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _eight_bit(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8) if values.dtype == np.uint16 else values


def _plain_png(data: bytes) -> np.ndarray | None:
    """Fast for what sets are made of: 8-bit RGB PNGs; None of any other."""
    if data[:8] != _PNG_MAGIC or data[24:26] != b"\x08\x02" or b"tRNS" in data[:65536] or b"acTL" in data[:65536]:
        return None
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if image is not None and image.shape[2:] == (3,) else None


def decode_image(data: bytes, where: str = "image") -> np.ndarray:
    """RGB uint8 [H, W, 3] of an encoded image (JPEG by simplejpeg, the rest by `data.picture`), turned upright.

    Raises DataError, naming `where`, for bytes that do not decode, truncated JPEGs included.
    """
    if len(data) == 0:
        raise DataError(f"{where}: the file is empty; replace it or leave it out")
    if data[:3] == _JPEG_MAGIC:
        try:
            # Strict: OpenCV fills what is missing of a truncated JPEG with grey and says nothing.
            image = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        except ValueError as error:
            raise DataError(f"{where}: the JPEG does not decode ({error}); replace it or leave it out") from None
    elif (image := _plain_png(data)) is None:
        return _rgb_u8(read_stored(data, where))
    orientation = exif_orientation(data)
    return image if orientation == 1 else upright_array(image, orientation)


def image_size(data: bytes, where: str = "image") -> tuple[int, int]:
    """(height, width) in px of an encoded image as `decode_image` returns it; reads only the header if it can."""
    try:
        if data[:3] == _JPEG_MAGIC:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
        elif data[:8] == _PNG_MAGIC and len(data) >= 24:
            width, height = struct.unpack(">II", data[16:24])
        else:
            return decode_image(data, where).shape[:2]
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{where}: the image's header does not read ({error}); replace it or leave it out") from None
    if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE):
        raise DataError(f"{where}: the image's header says {width}×{height} px; replace it or leave it out")
    return (width, height) if exif_orientation(data) >= 5 else (height, width)


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """JPEG bytes, 4:4:4, of RGB uint8 [H, W, 3]."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "444", fastdct=False)


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes (lossless) of RGB uint8 [H, W, 3]; equal pixels give equal bytes under one OpenCV version."""
    done, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 3])
    assert done, "PNG encoding of a valid RGB array cannot fail"
    return data.tobytes()


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """PSNR in dB between two uint8 pictures [H, W, C] or [H, W] of one shape; inf when they are equal.

    Raises ValueError when shapes differ, a picture is empty, or a dtype is not uint8.
    """
    if first.dtype != np.uint8 or second.dtype != np.uint8:
        raise ValueError(f"psnr of {first.dtype} and {second.dtype}: give two uint8 pictures")
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"psnr of shapes {first.shape} and {second.shape}: give two pictures of one, non-empty shape")
    # cv2.norm accumulates squares in exact integers blockwise; flattening admits any number of channels.
    squares = cv2.norm(
        np.ascontiguousarray(first).reshape(-1), np.ascontiguousarray(second).reshape(-1), cv2.NORM_L2SQR
    )
    return math.inf if squares == 0 else 10.0 * math.log10(255.0**2 * first.size / squares)
