"""The averaged model of a network that uses one parameter under many names (MPRNet's PReLU)."""

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
MPRNET = "{name: mprnet, n_feat: 8, scale_unetfeats: 4, scale_orsnetfeats: 4, num_cab: 1}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shared_parameter_is_averaged_under_each_of_its_names_and_a_run_goes_on_from_it(runs, ranks):
    name, zero = f"shared{ranks}", 3 if ranks == 2 else 0
    settings = {"model__backbone": MPRNET, "model__prior": False, "eval__at_start": False, "eval__per_tier": 1}
    settings |= {"train__batch": 2, "engine__zero": zero, "eval__panels": 0}
    runs.run(name, ranks=ranks, train__steps=2, **settings)
    state = load_file(runs.folder(name) / "checkpoints/step-00000002/model.safetensors")
    slopes = [value for key, value in state.items() if value.shape == (1,)]
    assert len(slopes) > 20
    assert slopes[0] != 0.25  # where PReLU starts
    assert all(torch.equal(slope, slopes[0]) for slope in slopes)
    runs.run(name, "--resume", "auto", "--extend", "3", ranks=ranks, train__steps=2, **settings)
    assert sorted(runs.losses(name)) == [1, 2, 3]
