"""The light student: small, seeded, of any size, learning everywhere."""

import pytest
import torch

from model.encoder import EncoderSpec, build_encoder, level_channels
from model.summary import summarize
from tests.model.models import RANDOM, deblurrer

TINY = {"backbone": {"name": "unet", "width": 8, "blocks": [1, 1, 1]}, "teacher": RANDOM}
LIGHT = EncoderSpec("light")


def test_it_is_light():
    light, default = (
        summarize(deblurrer(**TINY, student={"name": name, "width": 8, **RANDOM}), (64, 64)).parts
        for name in ("light", "efficientnet_lite0")
    )
    assert light["student"][0] < 1_000_000 < 2_000_000 < default["student"][0]
    assert light["student"][1] < 0.6 * default["student"][1]


def test_its_first_weights_come_from_the_seed_alone():
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed + 50)  # which must not matter
        model = deblurrer(**TINY, student={"name": "light", "width": 8}, seed=seed)
        return {k: v for k, v in model.prior.student.state_dict().items() if v.ndim > 1}

    one, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not any(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("size", [(64, 96), (65, 33), (1, 1), (7, 130)])
def test_every_size_gives_the_pyramid(size):
    features = build_encoder(LIGHT).eval()(torch.rand(1, 3, *size))
    assert level_channels(LIGHT) == (32, 64, 112, 192)
    assert [tuple(f.shape[1:]) for f in features] == [
        (c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip((32, 64, 112, 192), (4, 8, 16, 32), strict=True)
    ]


def test_features_do_not_depend_on_the_rest_of_the_batch():
    encoder, x = build_encoder(LIGHT).train(), torch.rand(3, 3, 64, 64)
    for whole, alone in zip(encoder(x), encoder(x[1:2]), strict=True):
        torch.testing.assert_close(whole[1:2], alone)


def test_every_parameter_learns_with_any_number_of_levels():
    for levels in (1, 3, 4):
        encoder = build_encoder(EncoderSpec("light", levels=levels), prune=True)
        sum(f.square().mean() for f in encoder(torch.rand(1, 3, 64, 64))).backward()
        assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_it_has_no_weights_to_read_and_no_fifth_level():
    for spec, words in (
        (EncoderSpec("light", weights="some.pth"), "leave weights out"),
        (EncoderSpec("light", levels=5), "set fewer levels"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            build_encoder(spec)
        assert "\n" not in str(caught.value)
