"""A gate on the correction: nothing changes at first; it can take a correction back, and learns where."""

import contextlib

import pytest
import torch

from model.gate import CorrectionGate, energies
from tests.model.test_deblurrer import image, perturb, small
from train.config.schema import Config
from train.objective.task import DeblurTask, extent_error


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
    assert (other.extent, other.own) == (None, None)
    assert torch.equal(one.own, other.restored[-1])
    assert torch.equal(one.extent, torch.zeros(2))


def codes(seed: int) -> torch.Tensor:
    return torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


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


def test_what_the_gate_learns_from_moves_nothing_else():
    model = small(gate=True)
    perturb(model)
    out = model(image(2, 3, 64, 64))
    (out.restored[-1].square().mean() + extent_error(out.extent, torch.tensor([3.0, 40.0]))).backward()
    moved = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {"gate"}


def test_the_network_learns_as_if_there_were_no_gate():
    gated, plain = small(gate=True), small()
    plain.load_state_dict({name: v for name, v in gated.state_dict().items() if not name.startswith("gate.")})
    batch = {"blurry": codes(1), "sharp": codes(2), "extent": torch.tensor([3.0, 40.0])}
    for model in (gated, plain):
        perturb(model.backbone)
        config = Config(model={"prior": False})
        loss, parts = DeblurTask(config, torch.device("cpu")).losses(
            model, batch, distill=False, autocast=contextlib.nullcontext()
        )
        loss.backward()
        assert ("own_pixel" in parts) == (model is gated)
    for (name, one), (_, other) in zip(
        gated.backbone.named_parameters(), plain.backbone.named_parameters(), strict=True
    ):
        assert torch.equal(one.grad, other.grad), name


def gradients(extents: list[float], first: int = 0, **changes) -> dict[str, torch.Tensor]:
    """Of the network's parameters, by a batch's pairs from `first` on, each weighing one half."""
    model = small(gate=True, prior=False, **changes)
    perturb(model)
    batch = {"blurry": codes(1)[first:], "sharp": codes(2)[first:], "extent": torch.tensor(extents)[first:]}
    config = Config(model={"prior": False}, loss={"pixel": "psnr", "frequency": 0})
    loss, _ = DeblurTask(config, torch.device("cpu")).losses(
        model, batch, distill=False, autocast=contextlib.nullcontext()
    )
    (loss * len(batch["blurry"]) / 2).backward()
    return {name: parameter.grad for name, parameter in model.backbone.named_parameters()}


@pytest.mark.parametrize(
    "backbone", [{"name": "unet", "width": 8, "blocks": [1, 1]}, {"name": "mimounet", "num_res": 1}]
)
def test_pairs_without_blur_teach_the_gate_alone_and_those_of_unknown_blur_the_network_too(backbone):
    alone, both = gradients([40.0, 40.0], first=1, backbone=backbone), gradients([40.0, 40.0], backbone=backbone)
    still, unknown = gradients([0.0, 40.0], backbone=backbone), gradients([torch.nan, 40.0], backbone=backbone)
    for name, gradient in still.items():
        assert (gradient - alone[name]).abs().max() < 1e-3 * alone[name].abs().max()
        assert torch.equal(unknown[name], both[name])
    assert any(not torch.allclose(both[name], gradient, rtol=1e-2) for name, gradient in still.items())


def test_energies_fall_with_blur_first_at_the_finest_scale_and_along_its_direction():
    flat = energies(torch.full((1, 3, 64, 64), 0.3))
    assert torch.equal(flat, torch.full((1, 16, 8, 8), (-6 + 4) / 1.5))
    noise = image(1, 3, 64, 96)
    smeared = torch.nn.functional.avg_pool2d(noise, (1, 9), stride=1, padding=(0, 4))
    fell = (energies(noise) - energies(smeared)).mean(dim=(0, 2, 3)).view(4, 4)
    right, below, *_ = fell.unbind(1)
    assert (fell[:3] > 0.1).all()
    assert (right > below)[:3].all()
    assert (right.diff() < 0).all()


@pytest.mark.parametrize("size", [(8, 8), (40, 136)])
def test_a_gate_takes_any_size_that_eight_divides(size):
    gate, blurry, restored = CorrectionGate(), image(2, 3, *size), image(2, 3, *size).flip(-1)
    perturb(gate)
    gated, extent = gate(blurry, restored)
    assert gated.shape == blurry.shape
    assert extent.shape == (2,)
    trust = (gated - restored) / (restored - blurry)
    assert trust[(restored - blurry).abs() > 0.05].abs().max() < 1.001


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
