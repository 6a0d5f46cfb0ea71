"""A gate on the correction: nothing changes at first; it can take a correction back, and learns where."""

import pytest
import torch

from tests.model.test_deblurrer import image, perturb, small
from train.objective.task import extent_error


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (50, 70)])
def test_a_fresh_gate_changes_nothing_to_the_bit(prior, size):
    gated, plain = small(gate=True, prior=prior).eval(), small(prior=prior).eval()
    for model in (gated, plain):
        perturb(model.backbone)
    x = image(2, 3, *size)
    one, other = gated(x), plain(x)
    assert torch.equal(one.restored[-1], other.restored[-1])
    assert one.restored[-1].shape == x.shape
    assert other.extent is None
    assert torch.equal(one.extent, torch.zeros(2))


def test_a_closed_gate_gives_the_image_back():
    model = small(gate=True).eval()
    perturb(model.backbone)
    with torch.no_grad():
        model.gate.map.bias.fill_(-40)
    x = image(1, 3, 64, 64)
    torch.testing.assert_close(model(x).restored[-1], x, rtol=0, atol=1e-6)


def test_the_prior_informs_the_gate():
    model = small(gate=True).eval()
    perturb(model.gate)
    x = image(1, 3, 64, 64)
    levels = model(x).prior
    moved = [model(x, *(level + (n == place) for n, level in enumerate(levels))).extent for place in range(4)]
    assert [not torch.equal(each, model(x).extent) for each in moved] == [False, True, False, False]


def test_every_parameter_of_the_gate_learns():
    model = small(gate=True)
    perturb(model)
    out = model(image(2, 3, 64, 64))
    (out.restored[-1].square().mean() + extent_error(out.extent, torch.tensor([3.0, 40.0]))).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.gate.parameters())


def test_the_error_of_the_extent_is_of_the_pairs_whose_extent_is_known():
    predicted = torch.tensor([2.0, 5.0, 100.0])
    assert extent_error(predicted, torch.tensor([3.0, 63.0, torch.nan])) == pytest.approx(0.5)
    assert extent_error(predicted, torch.full((3,), torch.nan)) == 0


def test_smaller_outputs_stay_as_they_are():
    gated, plain = (
        small(gate=gate, backbone={"name": "mimounet", "num_res": 1}, spe={"points": ["bottleneck"]}).eval()
        for gate in (True, False)
    )
    with torch.no_grad():
        gated.gate.map.bias.fill_(-40)
    x = image(1, 3, 64, 64)
    one, other = gated(x).restored, plain(x).restored
    assert all(torch.equal(a, b) for a, b in zip(one[:-1], other[:-1], strict=True))
    assert not torch.equal(one[-1], other[-1])
