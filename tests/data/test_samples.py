"""The bundled photographs are what their attribution says: whole, sharp, small enough, split by photograph."""

import json
from pathlib import Path

from data.image import decode_image
from data.shards.set import ShardSet
from data.shards.verify import verify
from tests.studies.make_samples import LICENCES, PHOTOGRAPHS, TILE, attribution, sharpness

ROOT = Path(__file__).parents[2] / "data" / "samples"


def tiles(split: str):
    shards = ShardSet(ROOT / split)
    for number in range(len(shards)):
        yield json.loads(shards.read(number, "json")), decode_image(shards.read(number, "jpg"))


def test_sets_are_sound():
    assert verify(ROOT / "train") == verify(ROOT / "val") == []


def test_size_and_count_keep_the_limits():
    assert 40 <= sum(len(ShardSet(ROOT / split)) for split in ("train", "val")) <= 60
    assert sum(path.stat().st_size for path in ROOT.rglob("*.tar")) <= 8_000_000


def test_train_and_val_share_no_photograph():
    used = {split: {facts["photograph"] for facts, _ in tiles(split)} for split in ("train", "val")}
    assert not used["train"] & used["val"]
    assert used["train"] | used["val"] == set(PHOTOGRAPHS)


def test_every_tile_is_sharp_and_textured():
    for split in ("train", "val"):
        for facts, image in tiles(split):
            assert image.shape == (TILE, TILE, 3)
            texture, sharp = sharpness(image)
            assert texture > 4, facts
            assert sharp > 0.2, facts


def test_every_tile_names_author_and_licence_and_the_attribution_is_current():
    for split in ("train", "val"):
        for facts, _ in tiles(split):
            assert facts["author"]
            assert facts["licence_url"] == LICENCES[facts["licence"]]
    assert (ROOT / "ATTRIBUTION.md").read_text() == attribution()
