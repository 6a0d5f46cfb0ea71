"""A small exported model, and photographs to restore with it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.config import ModelConfig
from model.deblurrer import build_deblurrer
from model.pretrained import save_pretrained
from train.config.file import build_config


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A UNet of 8 channels that does something."""
    section = {"backbone": {"name": "unet", "width": 8, "blocks": [1, 1]}, "prior": False}
    state = build_deblurrer(ModelConfig(**section), seed=1).state_dict()
    state["backbone.leave.weight"] = state["backbone.enter.weight"].mean() + state["backbone.leave.weight"] + 0.01
    file = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_pretrained(file, state, build_config({"model": section, "data": {"crop": 64}}).model_dump(mode="json"))
    return file


def photo(path: Path, size: tuple[int, int] = (70, 50), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.Generator(np.random.Philox(seed)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(array).save(path)
    return path
