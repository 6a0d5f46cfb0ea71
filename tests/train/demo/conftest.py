"""A small model that changes pictures, as a file."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def model_file(tmp_path_factory) -> Path:
    """An exported U-Net without a prior whose last layer adds some of what it sees: no restoration, but a change."""
    from model.config import ModelConfig
    from model.deblurrer import build_deblurrer
    from model.pretrained import save_pretrained
    from train.config.file import build_config

    section = {"backbone": {"name": "unet", "width": 8, "blocks": [1, 1]}, "prior": False}
    torch.manual_seed(0)
    state = build_deblurrer(ModelConfig(**section)).state_dict()
    state["backbone.leave.weight"] = 0.2 * torch.randn_like(state["backbone.leave.weight"])
    path = tmp_path_factory.mktemp("model") / "changing.safetensors"
    save_pretrained(path, state, build_config({"model": section, "data": {"crop": 64}}).model_dump(mode="json"))
    return path
