"""The network that a run's configuration names."""

from __future__ import annotations

from model.deblurrer import Deblurrer, build_deblurrer
from train.config.schema import Config


def build_model(config: Config, *, read_weights: bool = True) -> Deblurrer:
    """The module that a configuration describes; its fresh weights depend on the seed alone. A prior that never learns
    rests, and none of it is trained. One that is taken from elsewhere reads no weights."""
    read = read_weights and config.model.prior_from is None
    network = build_deblurrer(config.model, seed=config.run.seed, read_weights=read)
    if network.prior is not None and config.student_rests and not config.train.distill_steps:
        network.prior.requires_grad_(False).rest()
    if config.optim.backbone_lr_scale == 0:
        network.backbone.requires_grad_(False)
    return network
