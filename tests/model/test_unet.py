"""The UNet: an identity when new, blind to a tint, declared points and multiple, and the receptive field it claims."""

import inspect

import pytest
import torch

from model.backbones import BACKBONES, UNet


def alive(**options) -> UNet:
    """A UNet whose last convolution is not zero any more."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(**options)
        torch.nn.init.normal_(net.leave.weight, std=0.05)
    return net


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_new_unet_is_the_exact_identity(patch):
    x = torch.rand(2, 3, 32, 64)
    assert torch.equal(UNet(width=4, blocks=(1, 1, 1), patch=patch)(x)[-1], x)


def test_a_constant_image_comes_back_and_a_tint_goes_through():
    net = alive(width=8, blocks=(1, 1, 1))
    colour = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1)
    torch.testing.assert_close(net(colour.expand(1, 3, 32, 32))[0], colour.expand(1, 3, 32, 32), rtol=0, atol=1e-5)
    x = torch.rand(1, 3, 32, 32)
    assert not torch.allclose(net(x)[0], x, atol=1e-3)
    torch.testing.assert_close(net(x + colour)[0], net(x)[0] + colour, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("blocks", "patch"), [((1, 1, 1, 2), 2), ((1, 1, 2), 4), ((2, 1), 1)])
def test_embed_is_called_at_the_declared_points_with_the_declared_shapes(blocks, patch):
    net = UNet(width=8, blocks=blocks, patch=patch)
    seen = {}

    def embed(name, feature):
        seen[name] = tuple(feature.shape)
        return feature

    height, width = 2 * net.stride_multiple, 3 * net.stride_multiple
    net(torch.rand(1, 3, height, width), embed)
    assert seen == {name: (1, c, height // s, width // s) for name, (c, s) in net.embed_points.items()}
    assert "bottleneck" in seen
    assert "decoder1" not in seen


def test_what_embed_returns_is_what_the_network_goes_on_with():
    net, x = alive(width=4, blocks=(1, 1, 1)), torch.rand(1, 3, 16, 16)
    for point in net.embed_points:
        changed = net(x, lambda name, f, point=point: f + 1 if name == point else f)[0]
        assert not torch.allclose(changed, net(x)[0])


def receptive_field(blocks: tuple[int, ...], patch: int) -> int:
    """Width in px of the input that can change one output pixel, at the position where it is widest.

    Followed backwards along the path through the bottleneck; the mean colour, which sees every pixel, is left out.
    """

    def reach(pixel: int) -> int:
        first = last = pixel // patch
        grow = 1  # of the leaving convolution, in cells to either side
        for count in blocks[:-1]:
            first, last = (first - grow - 2 * count) // 2, (last + grow + 2 * count) // 2
            grow = 0
        first, last = first - 2 * blocks[-1], last + 2 * blocks[-1]
        for count in reversed(blocks[:-1]):
            first, last = 2 * first - 2 * count, 2 * last + 1 + 2 * count
        return patch * (last - first + 3)  # the entering convolution, and both ends counted

    return max(reach(pixel) for pixel in range(patch * 2 ** (len(blocks) - 1)))


@pytest.mark.parametrize(("blocks", "patch"), [((1, 1), 1), ((1, 1, 1), 2), ((0, 2, 1), 1)])
def test_the_receptive_field_is_as_claimed(blocks, patch):
    net = alive(width=2, blocks=blocks, patch=patch).double()
    claimed = receptive_field(blocks, patch)
    side = 2 * claimed // net.stride_multiple * net.stride_multiple + net.stride_multiple
    x = torch.rand(1, 3, side, side, dtype=torch.double).requires_grad_()
    middle, widest = side // 2, 0
    for offset in range(net.stride_multiple):
        # The image's mean touches every pixel equally: the difference from that background is the convolutions' reach.
        (gradient,) = torch.autograd.grad(net(x)[0][0, 0, middle + offset, middle], x)
        reached = (gradient[0] - gradient[0, :, :1, :1]).abs().sum(0).amax(1) > 1e-12
        rows = reached.nonzero()
        widest = max(widest, int(rows.max() - rows.min()) + 1)
    assert widest == claimed


def test_the_default_reach_is_the_docstring_s():
    defaults = inspect.signature(UNet).parameters
    assert receptive_field(defaults["blocks"].default, defaults["patch"].default) == 268
    assert "268 px" in UNet.__doc__
    assert BACKBONES["unet"] is UNet


@pytest.mark.parametrize("wrong", [{"width": 0}, {"blocks": (1,)}, {"blocks": (1, -1)}, {"patch": 0}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match="a UNet needs"):
        UNet(**wrong)
