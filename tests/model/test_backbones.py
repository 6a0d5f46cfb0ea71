"""What every backbone of the table must be. A new row is all that a new backbone needs here (and one in `SMALL`, where
its defaults are too large for a test)."""

import pytest
import torch

from model.backbones import BACKBONES
from model.deblurrer import build_backbone
from tests.model.models import RANDOM, SMALL, deblurrer

every = pytest.mark.parametrize("name", BACKBONES)


def image(*size: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(0))


def awake(network: torch.nn.Module) -> torch.nn.Module:
    """Its parameters moved a little: what starts at zero hides what comes before it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network


def settings(name: str) -> dict:
    return {"name": name, **SMALL.get(name, {})}


def with_prior(name: str, **student: object):
    """The backbone, and a small prior at all its points."""
    options = {"name": "light", "width": 8, **student}
    return deblurrer(
        backbone=settings(name), teacher=RANDOM, student=options, spe={"dim": 8, "groups": 2, "heads": 1}
    ).eval()


@every
@pytest.mark.parametrize("size", [(64, 96), (97, 131), (7, 130), (1, 1)])
def test_every_size_is_restored_with_the_full_size_last(name, size):
    network = deblurrer(backbone=settings(name), prior=False).eval()
    with torch.no_grad():
        restored = network(image(2, 3, *size)).restored
    assert restored[-1].shape == (2, 3, *size)
    assert all(each.shape[:2] == (2, 3) and each.shape[-1] <= size[1] for each in restored)


@every
def test_a_fresh_prior_leaves_it_as_it_was_to_the_bit(name):
    network = with_prior(name)
    awake(network.backbone)
    x = image(2, 3, 2 * network.multiple, 3 * network.multiple)
    with torch.no_grad():
        alone = network.backbone(x)
        together = network(x).restored
    assert list(network.spe) == list(network.backbone.embed_points)
    assert network.spe
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@every
def test_each_point_is_called_once_with_what_it_declares_and_what_comes_back_is_used(name):
    network = awake(build_backbone(**settings(name)))
    side, called = 2 * network.stride_multiple, []
    x = image(1, 3, side, side)

    def note(point: str, feature: torch.Tensor) -> torch.Tensor:
        called.append((point, tuple(feature.shape)))
        return feature

    plain = network(x, note)[-1]
    points = network.embed_points
    assert sorted(called) == sorted((p, (1, c, side // s, side // s)) for p, (c, s) in points.items())
    for point in points:
        moved = network(x, lambda here, feature, point=point: feature + (here == point))[-1]
        assert not torch.equal(moved, plain), point


@every
def test_a_sample_does_not_see_the_others_and_every_parameter_learns(name):
    network = awake(build_backbone(**settings(name)))
    x = image(2, 3, 4 * network.stride_multiple, 4 * network.stride_multiple)
    torch.testing.assert_close(network(x)[-1][:1], network(x[:1])[-1], rtol=1e-3, atol=1e-3)
    sum(out.square().mean() for out in network(x)).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@every
def test_settings_are_named_and_a_wrong_one_is_refused(name):
    with pytest.raises(ValueError, match=f"unknown setting of backbone {name}: 'nonsense'"):
        deblurrer(backbone={"name": name, "nonsense": 1}, prior=False)
    with pytest.raises(ValueError, match=f"did you mean {name}"):
        deblurrer(backbone={"name": f"{name}x"}, prior=False)
