"""Images as the whole of data/ sees them: RGB uint8 [H, W, 3], whatever the file held.

The rule for other forms: grey is copied to three channels; 16 bit becomes 8 by round(v / 257); alpha is composited over
white (what a viewer shows); EXIF orientation is applied. Floating-point and palette-less exotic forms are refused.
"""

import io
import math
import struct

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from data.errors import DataError

_ORIENTATION_TAG = 274
_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def exif_orientation(data: bytes) -> int:
    """EXIF orientation 1..8 of an encoded image; 1 where none is recorded."""
    # JPEG keeps EXIF in the first segments, PNG and WebP in a chunk that may come last.
    head = data[:65536] if data[:2] == b"\xff\xd8" else data
    if b"Exif" not in head and b"eXIf" not in head:
        return 1
    try:
        with Image.open(io.BytesIO(data)) as image:
            value = int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        return 1
    return value if 1 <= value <= 8 else 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (2, 4):
        image = image[:, ::-1] if orientation == 2 else image[::-1]
    elif orientation in (3, 6, 8):
        image = np.rot90(image, {3: 2, 6: -1, 8: 1}[orientation])
    elif orientation in (5, 7):
        image = image.swapaxes(0, 1) if orientation == 5 else np.rot90(image, 2).swapaxes(0, 1)
    return np.ascontiguousarray(image)


def to_rgb_u8(image: np.ndarray, where: str = "image") -> np.ndarray:
    """RGB uint8 [H, W, 3] of an array in OpenCV's order: grey [H, W], BGR or BGRA [H, W, 3|4], uint8 or uint16."""
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if image.dtype != np.uint8:
        raise DataError(f"{where}: pixels are {image.dtype}; convert the image to 8 or 16 bits a channel")
    if image.ndim == 2 or image.shape[2] == 1:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if image.shape[2] == 3:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    if image.shape[2] != 4:
        raise DataError(f"{where}: {image.shape[2]} channels; convert the image to grey, RGB or RGBA")
    colour, alpha = image[..., 2::-1].astype(np.uint32), image[..., 3:].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _decode_any(data: bytes, where: str) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    if image is None:
        raise DataError(f"{where}: the image does not decode; replace the file or leave it out")
    return to_rgb_u8(image, where)


def decode_image(data: bytes, where: str = "image") -> np.ndarray:
    """RGB uint8 [H, W, 3] of an encoded image (JPEG by simplejpeg, the rest by OpenCV), EXIF orientation applied.

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
    else:
        image = _decode_any(data, where)
    orientation = exif_orientation(data)
    return image if orientation == 1 else _upright(image, orientation)


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
