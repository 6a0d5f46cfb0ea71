"""Folded BatchNorms: the same features with fewer operators; names, state dict and later weights as they were."""

import copy

import pytest
import torch
from torch import nn

from model.encoder import Encoder, EncoderSpec, build_encoder
from model.folding import foldable, folded
from train.plan.cost import operators_of


def alive(encoder: Encoder) -> Encoder:
    """The same with BatchNorms that do something: a fresh one is the identity."""
    generator = torch.Generator().manual_seed(1)
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for value, low, high in (
                    (module.running_mean, -1.0, 1.0),
                    (module.running_var, 0.5, 2.0),
                    (module.weight, 0.5, 1.5),
                    (module.bias, -1.0, 1.0),
                ):
                    value.uniform_(low, high, generator=generator)
    return encoder.eval()


def image(*size: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("spec", "norms"),
    [
        (EncoderSpec(), 48),  # the bundled teacher with its own weights, as it is
        (EncoderSpec("resnet18", "random"), 20),
        (EncoderSpec("mobilenetv3_small_100", "random"), 34),
        (EncoderSpec("resnetv2_50", "random"), 32),  # its other 16 norms come before a convolution
        (EncoderSpec("light"), 0),
        (EncoderSpec("test_vit", "random"), 0),
    ],
    ids=lambda value: value.name if isinstance(value, EncoderSpec) else str(value),
)
def test_features_stay_but_for_rounding_and_the_state_dict_stays_whole(spec, norms):
    encoder = build_encoder(spec, prune=True)
    encoder = encoder.eval() if spec.weights == "pretrained" else alive(encoder)
    x, before = image(2, 3, 70, 96), {name: value.clone() for name, value in encoder.state_dict().items()}
    with torch.no_grad():
        plain = encoder(x)
        operators = operators_of(encoder.net, 64) if spec.name == "resnet18" else 0
        assert encoder.fold() == norms
        assert encoder.folded == (norms > 0)
        for a, b in zip(encoder(x), plain, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    after = encoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    if operators:
        assert operators_of(encoder._folded[0], 64) <= operators - norms


def test_a_folded_encoder_follows_load_state_dict_and_its_copies_run_on_their_own_weights():
    one, other = (alive(build_encoder(EncoderSpec("resnet18", "random"))) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        x, wanted = image(1, 3, 64, 64), other(image(1, 3, 64, 64))
        one.fold()
        twin = copy.deepcopy(one)
        assert one.folded and not twin.folded  # noqa: PT018 (one thought)
        nn.ModuleDict({"inner": one}).load_state_dict({f"inner.{k}": v for k, v in other.state_dict().items()})
        assert not one.folded
        assert all(torch.equal(a, b) for a, b in zip(one(x), wanted, strict=True))
        other.fold()
        low = other.to(torch.bfloat16)(x.bfloat16())
        assert all(feature.dtype == torch.bfloat16 for feature in low)


class Branches(nn.Module):
    """A pair that can be folded, and what cannot: a result read twice, a norm called twice, a standardised weight."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.pair_norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.twice, self.twice_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.again, self.again_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.odd, self.odd_norm = Halved(4, 4, 1), nn.BatchNorm2d(4)
        self.plain_norm = nn.BatchNorm2d(4, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pair_norm(self.pair(x)).relu()
        y = self.twice(x)
        x = self.twice_norm(y) + y
        x = self.again_norm(self.again_norm(self.again(x)))
        return self.plain_norm(self.odd_norm(self.odd(x)).relu())


class Halved(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight / 2, self.bias)


def test_what_is_no_plain_pair_is_left_as_it_is():
    net, x = Branches().train(), image(2, 3, 9, 8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    pairs = foldable(net, (x,))
    assert pairs == {"pair_norm": "pair"}
    assert net.training
    assert net.pair_norm.training
    assert int(net.pair_norm.num_batches_tracked) == 0
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(folded(net, pairs)(x), net(x), rtol=1e-5, atol=1e-6)
