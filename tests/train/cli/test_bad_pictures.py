"""A folder of good and bad pictures: the good ones are restored, each bad one is told, nothing else is touched."""

import io
import json
import os
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.train.cli.conftest import photo
from train.restore.sources import find_jobs


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(mode: str, seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    array = np.random.Generator(np.random.Philox(seed)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(array).convert(mode)


def huge() -> bytes:
    """A PNG of 20,000×20,000 px that is a few kilobytes long."""
    rows = zlib.compress(bytes(2501) * 20_000, 1)  # a byte of filter, 20,000 bits
    header = b"IHDR" + (20_000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    chunks = (header, b"IDAT" + rows, b"IEND")
    body = b"".join(len(c[4:]).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def bad_pictures(folder: Path, count: int) -> dict[str, list[Path]]:
    """`count` files of each of 12 kinds."""
    made: dict[str, list[Path]] = {}

    def put(kind: str, number: int, suffix: str, data: bytes) -> None:
        made.setdefault(kind, []).append(folder / f"bad-{kind}-{number}{suffix}")
        made[kind][-1].write_bytes(data)

    bomb = huge()
    for n in range(count):
        rgb, other = picture("RGB", n), picture("RGB", n + 100)
        jpeg, png = encoded(rgb, "JPEG"), bytearray(encoded(rgb, "PNG"))
        put("empty", n, ".jpg", b"")
        put("text", n, ".png", b"<html>not found</html>")
        put("cut-jpeg", n, ".jpg", jpeg[: len(jpeg) * (n + 1) // (count + 1)])
        put("cut-png", n, ".png", bytes(png[: len(png) * (n + 1) // (count + 1)]))
        png[len(png) // 2] ^= 255
        put("flipped-png", n, ".png", bytes(png))
        put("noise", n, ".tif", np.random.Generator(np.random.Philox(n)).bytes(3000))
        put("animated", n, ".webp", encoded(rgb, "WEBP", save_all=True, append_images=[other], duration=50))
        put("pages", n, ".tif", encoded(rgb, "TIFF", save_all=True, append_images=[other]))
        put("floats", n, ".tif", b"")
        tifffile.imwrite(made["floats"][-1], np.random.Generator(np.random.Philox(n)).random((20, 30), np.float32))
        put("huge", n, ".png", bomb)
        link, pipe = folder / f"bad-link-{n}.jpg", folder / f"bad-pipe-{n}.jpg"
        link.symlink_to(folder / "nowhere.jpg")
        os.mkfifo(pipe)
        made.setdefault("link", []).append(link)
        made.setdefault("pipe", []).append(pipe)
    return made


def good_pictures(folder: Path) -> list[Path]:
    """20 pictures of all kinds that are read."""
    paths = [
        photo(folder / f"good-{n}{suffix}", (40, 30), n)
        for n, suffix in enumerate((".jpg", ".png", ".webp", ".bmp", ".tif") * 2)
    ]
    for mode, suffix in (
        ("L", ".png"),
        ("LA", ".png"),
        ("RGBA", ".png"),
        ("P", ".png"),
        ("1", ".png"),
        ("CMYK", ".jpg"),
    ):
        paths.append(folder / f"good-as-{mode}{suffix}")
        picture(mode if mode != "LA" else "L", 7).convert(mode).save(paths[-1])
    deep = np.random.Generator(np.random.Philox(1)).integers(0, 65536, (20, 30), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "good-deep.png")
    tifffile.imwrite(folder / "good-deep.tif", np.repeat(deep[..., None], 3, axis=2), photometric="rgb")
    picture("RGB", 3, (1, 1)).save(folder / "good-point.png")
    (folder / "good-misnamed.png").write_bytes(encoded(picture("RGB", 4), "JPEG"))
    return [*paths, *(folder / f"good-{name}" for name in ("deep.png", "deep.tif", "point.png", "misnamed.png"))]


def test_sixty_bad_pictures_of_twelve_kinds_do_not_stop_twenty_good_ones(model, sharpprior, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    bad, good = bad_pictures(folder, 5), good_pictures(folder)
    assert (len(bad), sum(map(len, bad.values())), len(good)) == (12, 60, 20)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    status, text, error = sharpprior("restore", folder, "--model", model, "-o", out, "--json")
    assert status == 1
    assert "20 restored, 0 there already, 60 failed, 0 skipped" in error
    lines = [json.loads(line) for line in text.splitlines()]
    assert Counter(line["status"] for line in lines) == {"failed": 60, "restored": 20}
    assert {line["source"] for line in lines if line["status"] == "failed"} == {
        str(p) for ps in bad.values() for p in ps
    }
    for line in lines:
        if line["status"] == "failed":
            assert line["source"] in line["problem"]
            assert len(line["problem"].splitlines()) == 1
    assert len(list(out.iterdir())) == 20
    for path in out.iterdir():
        with Image.open(path) as image:
            image.load()
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    words = {"huge": "20000×20000 px, more than 256 megapixels", "pipe": "is no file", "link": "no such file",
             "animated": "2 pages or frames", "floats": "floating-point", "empty": "the file is empty"}  # fmt: skip
    problems = {line["source"]: line["problem"] for line in lines}
    for kind, expected in words.items():
        assert all(expected in problems[str(path)] for path in bad[kind]), kind


def test_a_folder_that_cannot_be_read_is_told_and_the_rest_go_on(tmp_path, monkeypatch):
    for name in ("a/1.png", "secret/2.png", "z/3.png"):
        photo(tmp_path / name)
    plain = os.scandir

    def scandir(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may read everything
    found = find_jobs([str(tmp_path)], None)
    assert [job.source.name for job in found.jobs] == ["1.png", "3.png"]
    assert found.failed == [(tmp_path / "secret", f"{tmp_path / 'secret'}: Permission denied")]


@pytest.mark.parametrize("kind", [".png", ".jpg", ".tif", ".webp"])
def test_an_interrupted_writer_leaves_the_old_file(tmp_path, monkeypatch, kind):
    from train.restore.picture import PictureError, read_picture, write_picture

    target = photo(tmp_path / f"a{kind}")
    before, new = target.read_bytes(), read_picture(target)

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(PictureError, match="cannot be written: No space left on device"):
        write_picture(target, new, overwrite=True)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
