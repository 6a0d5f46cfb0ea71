"""The network that a run's configuration names."""

from __future__ import annotations

from model.deblurrer import Deblurrer, build_deblurrer
from train.config.schema import Config


def build_model(config: Config, *, read_weights: bool = True) -> Deblurrer:
    """The module that a configuration describes; its fresh weights depend on the seed alone."""
    return build_deblurrer(config.model, seed=config.run.seed, read_weights=read_weights)
