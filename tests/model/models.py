"""Networks for tests, from the settings of a configuration's `model:` section."""

from typing import Any

from model.config import ModelConfig
from model.deblurrer import Deblurrer, build_deblurrer

RANDOM = {"weights": "random"}  # teacher and student of the usual architecture, without reading weights


def deblurrer(*, seed: int = 0, read_weights: bool = True, **settings: Any) -> Deblurrer:
    """The deblurrer of these settings."""
    return build_deblurrer(ModelConfig(**settings), seed=seed, read_weights=read_weights)
