"""The networks' recipes: one for every published size that people compare with, each of which builds and divides."""

from pathlib import Path

import pytest
import torch

from model.backbones import PRESETS
from train.config.file import load_config
from train.config.networks import build_model
from train.config.patches import phases
from train.objective.task import check_loss

FOLDER = Path(__file__).parents[3] / "configs" / "networks"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# Published numbers of parameters, M.
SIZES = {
    "fftformer": 16.6, "mimo-unet": 6.8, "mimo-unet-plus": 16.1, "mprnet": 20.1, "nafnet-32": 17.1, "nafnet-64": 67.9,
    "restormer": 26.1, "stripformer": 19.7, "uformer-b": 50.9,
}  # fmt: skip


def test_there_is_a_recipe_for_every_network():
    assert sorted(SIZES) == RECIPES


@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_builds_its_network_at_the_published_size(name):
    config = load_config(FOLDER / f"{name}.yaml", [])
    assert config.run.name == config.model.backbone["name"] == name
    check_loss(config)
    for ranks in (1, 2, 4, 8):
        if phases(config)[0].batch % ranks == 0:
            config.micro_batch(ranks)
    with torch.device("meta"):
        network = build_model(config)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=0.06)
    with torch.device("meta"):
        plugged = build_model(config.model_copy(update={"model": config.model.model_copy(update={"prior": True})}))
    assert set(plugged.spe) == set(plugged.backbone.embed_points)


def test_restormer_sees_the_patches_of_its_paper():
    found = phases(load_config(FOLDER / "restormer.yaml", []))
    assert [(each.crop, each.batch, each.last - each.first) for each in found] == [
        (128, 64, 92000), (160, 40, 64000), (192, 32, 48000), (256, 16, 36000), (320, 8, 36000), (384, 8, 24000),
    ]  # fmt: skip


def test_every_preset_names_a_backbone_of_the_table():
    from model.backbones import BACKBONES

    assert {settings["name"] for settings in PRESETS.values()} <= set(BACKBONES)
