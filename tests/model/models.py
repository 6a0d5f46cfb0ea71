"""Networks for tests, from the settings of a configuration's `model:` section."""

from typing import Any

from model.config import ModelConfig
from model.deblurrer import Deblurrer, build_deblurrer

RANDOM = {"weights": "random"}  # teacher and student of the usual architecture, without reading weights

# Settings of backbones whose defaults are the paper's size.
SMALL: dict[str, dict[str, Any]] = {
    "fftformer": {"dim": 8, "num_blocks": (1, 1, 1), "num_refinement_blocks": 1},
    "nafnet": {"width": 8, "enc_blk_nums": (1, 1), "dec_blk_nums": (1, 1)},
    "restormer": {"dim": 8, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1},
    "uformer": {"embed_dim": 8, "depths": (1, 1, 1, 1, 1, 1, 1, 2, 1), "win_size": 2},
    "mimounet": {"num_res": 1},
    "mprnet": {"n_feat": 16, "scale_unetfeats": 8, "scale_orsnetfeats": 8, "num_cab": 1, "reduction": 2},
    "stripformer": {"blocks": (2, 1)},
}


def deblurrer(*, seed: int = 0, read_weights: bool = True, **settings: Any) -> Deblurrer:
    """The deblurrer of these settings."""
    return build_deblurrer(ModelConfig(**settings), seed=seed, read_weights=read_weights)
