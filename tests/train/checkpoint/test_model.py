"""The averaged model of a network that uses one parameter under many names (MPRNet's PReLU)."""

import pytest
import torch
from safetensors.torch import load_file

from model.pretrained import load_pretrained
from tests.model.models import deblurrer

pytestmark = pytest.mark.slow
MPRNET = {"name": "mprnet", "n_feat": 8, "scale_unetfeats": 4, "scale_orsnetfeats": 4, "num_cab": 1}


def test_a_shared_parameter_is_averaged_under_each_of_its_names(runs):
    name = "shared"
    settings = {"train__steps": 2, "train__batch": 2, "eval__at_start": False, "eval__per_tier": 1}
    runs.run(name, model__backbone=MPRNET, model__prior=False, **settings)
    folder = runs.folder(name) / "checkpoints/step-00000002"
    slopes = [value for value in load_file(folder / "model.safetensors").values() if value.shape == (1,)]
    assert len(slopes) > 20
    assert slopes[0] != 0.25  # where PReLU starts
    assert all(torch.equal(slope, slopes[0]) for slope in slopes)
    load_pretrained(deblurrer(backbone=MPRNET, prior=False), folder)  # every name is there
