"""Images become RGB uint8 by one rule, or a one-line error that names them."""

import io

import cv2
import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from data.errors import DataError
from data.image import decode_image, encode_jpeg, encode_png, image_size, psnr

RAMP = np.arange(24 * 16 * 3, dtype=np.uint32).reshape(24, 16, 3) * 7 % 256
RGB = RAMP.astype(np.uint8)
SRGB, LAB = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")


def png(array: np.ndarray) -> bytes:
    return cv2.imencode(".png", array)[1].tobytes()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_png_is_lossless_and_rgb():
    np.testing.assert_array_equal(decode_image(encode_png(RGB)), RGB)


def test_grey_is_copied_to_three_channels():
    decoded = decode_image(png(RGB[..., 0]))
    np.testing.assert_array_equal(decoded, np.repeat(RGB[..., :1], 3, 2))


def test_grey_jpeg_decodes_to_rgb():
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(RGB[..., :1]), 100, "GRAY", "GRAY")
    assert decode_image(data).shape == (24, 16, 3)


def test_sixteen_bit_becomes_eight_by_rounding_over_257():
    deep = np.array([[0, 128, 129, 65535 - 128, 65535, 32768]], np.uint16)
    assert decode_image(png(deep))[0, :, 0].tolist() == [0, 0, 1, 255, 255, 128]


def test_alpha_is_composited_over_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = [0, 128, 255]
    assert decode_image(png(rgba))[0, :, 1].tolist() == [255, 127, 0]


def test_sixteen_bit_alpha_keeps_colour_order():
    bgra = np.zeros((1, 1, 4), np.uint16)
    bgra[0, 0] = (0, 0, 65535, 65535)
    assert decode_image(png(bgra))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientation_is_applied_as_pillow_does(kind, orientation):
    from PIL import ImageOps

    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[274] = orientation
    data = saved(image, kind, exif=exif, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    decoded = decode_image(data)
    assert decoded.shape == expected.shape == (*image_size(data), 3)
    assert np.abs(decoded.astype(int) - expected).max() <= 2


def test_cmyk_jpeg_decodes():
    data = saved(Image.fromarray(np.full((16, 16, 3), (200, 30, 40), np.uint8)).convert("CMYK"), "JPEG", quality=98)
    assert np.abs(decode_image(data)[8, 8].astype(int) - (200, 30, 40)).max() < 12


@pytest.mark.parametrize("keep", [0, 10, 200, -40])
def test_truncated_jpeg_is_refused_by_name(keep):
    data = encode_jpeg(np.kron(RGB, np.ones((4, 4, 1), np.uint8)))[:keep]
    with pytest.raises(DataError, match=r"^tile 7: ") as caught:
        decode_image(data, "tile 7")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"hello", encode_png(RGB)[:60], b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image_are_refused(data):
    with pytest.raises(DataError, match="tile 7"):
        decode_image(data, "tile 7")


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.uint32])
def test_floating_point_images_are_refused_as_such(shape, kind):
    file = io.BytesIO()
    tifffile.imwrite(file, np.ones(shape, kind))
    with pytest.raises(DataError, match="tile 7: floating-point pixels, or more than 16 bits"):
        decode_image(file.getvalue(), "tile 7")


@pytest.mark.parametrize("mode", ["LAB", "CMYK", "P", "1", "L", "LA", "RGBA", "YCbCr"])
def test_tiffs_of_every_mode_are_read_as_pillow_shows_them(mode):
    image = Image.fromarray(np.kron(RGB, np.ones((4, 4, 1), np.uint8)))
    image = ImageCms.profileToProfile(image, SRGB, LAB, outputMode="LAB") if mode == "LAB" else image.convert(mode)
    packed = {"compression": "tiff_deflate"} if mode == "YCbCr" else {}  # Pillow 12 does not read its own plain one
    with Image.open(io.BytesIO(data := saved(image, "TIFF", **packed))) as stored:
        shown = stored.convert("RGBA") if "A" in mode[1:] and mode != "LAB" else stored.convert("RGB")
    expected = (
        np.asarray(Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB"))
        if shown.mode == "RGBA"
        else np.asarray(shown)
    )
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 1


def test_every_kind_of_png_is_read_the_same_way_as_by_pillow():
    image = Image.fromarray(RGB)
    clear = image.convert("P")
    for picture, options in (
        (image, {}),
        (image.convert("P"), {}),
        (clear, {"transparency": 3}),
        (image, {"transparency": (7, 7, 7)}),
        (image.convert("LA"), {}),
        (image.convert("1"), {}),
    ):
        data = saved(picture, "PNG", **options)
        shown = Image.open(io.BytesIO(data)).convert("RGBA")
        expected = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
        assert np.abs(decode_image(data).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("data", [encode_jpeg(RGB), encode_png(RGB), cv2.imencode(".webp", RGB)[1].tobytes()])
def test_size_is_the_decoded_size(data):
    assert image_size(data) == (24, 16)


def test_psnr_of_a_known_error():
    assert psnr(np.zeros((4, 4), np.uint8), np.full((4, 4), 10, np.uint8)) == pytest.approx(28.1308, abs=1e-4)
    assert psnr(RGB, RGB) == float("inf")


def deep_tiff(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, metadata=None, **options)
    return file.getvalue()


def test_deep_tiffs_of_every_layout_are_read_as_they_look():
    grey = np.full((8, 9), 50 * 257, np.uint16)
    rgb = np.dstack([np.full((8, 9), value * 257, np.uint16) for value in (200, 100, 50)])
    alpha = np.full((8, 9, 1), 128 * 257, np.uint16)
    assert decode_image(deep_tiff(grey, photometric="minisblack"))[0, 0].tolist() == [50, 50, 50]
    assert decode_image(deep_tiff(grey, photometric="miniswhite"))[0, 0].tolist() == [205, 205, 205]
    assert decode_image(deep_tiff(rgb, photometric="rgb"))[0, 0].tolist() == [200, 100, 50]
    planes = np.ascontiguousarray(np.moveaxis(rgb, -1, 0))
    assert decode_image(deep_tiff(planes, photometric="rgb", planarconfig="separate"))[0, 0].tolist() == [200, 100, 50]
    plain = decode_image(deep_tiff(np.dstack([rgb, alpha]), photometric="rgb", extrasamples=["unassalpha"]))
    assert np.abs(plain[0, 0].astype(int) - [227, 177, 152]).max() <= 1
    within = (np.dstack([rgb * (128 / 255), alpha])).astype(np.uint16)
    premultiplied = decode_image(deep_tiff(within, photometric="rgb", extrasamples=["assocalpha"]))
    assert np.abs(premultiplied.astype(int) - plain).max() <= 1
    other = decode_image(deep_tiff(np.dstack([rgb, alpha]), photometric="rgb", extrasamples=["unspecified"]))
    assert other[0, 0].tolist() == [200, 100, 50]
    with pytest.raises(DataError, match="16-bit TIFF of separated colours"):
        decode_image(deep_tiff(np.dstack([rgb, alpha]), photometric="separated"))


def test_animations_and_programs_are_no_pictures():
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    with pytest.raises(DataError, match="2 pages or frames"):
        decode_image(saved(frames[0], "PNG", save_all=True, append_images=frames[1:]))
    with pytest.raises(DataError, match="its kind is unknown"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_that_only_xmp_has_turns_picture_and_size(kind):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    if kind == "PNG":
        chunks = PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
        how = {"pnginfo": chunks}
    else:
        how = {"xmp": xmp}
    Image.new("RGB", (9, 12)).save(file := io.BytesIO(), kind, **how)
    assert decode_image(file.getvalue()).shape[:2] == (9, 12)
    assert image_size(file.getvalue()) == (9, 12)
