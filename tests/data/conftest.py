"""Small shard sets made on the fly, shared by the tests of data/."""

from pathlib import Path

import pytest

from data.image import encode_jpeg, encode_png
from data.shards.write import ShardWriter
from tests.data.pictures import picture


@pytest.fixture
def make_set(tmp_path):
    """make_set(shards=[3, 2], kind="sharp"): a set with that many samples in each shard; returns its folder."""

    def make(shards=(3, 2), *, kind: str = "sharp", side: int = 64, name: str = "set", prefix: str = "s") -> Path:
        root = tmp_path / name
        with ShardWriter(root, prefix=prefix) as writer:
            number = 0
            for count in shards:
                for _ in range(count):
                    image = picture(number, side, side)
                    if kind == "sharp":
                        writer.add(f"{prefix}{number:03d}", {"jpg": encode_jpeg(image), "json": b"{}"})
                    else:
                        members = {"sharp.png": encode_png(image), "blurry.png": encode_png(255 - image)}
                        writer.add(f"{prefix}{number:03d}", members)
                    number += 1
                writer._flush()
        return root

    return make
