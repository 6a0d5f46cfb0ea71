"""FFTformer: the official network's names and outputs, its spectra, and what it does with a prior."""

import pytest
import torch

from model.backbones.fftformer import DFFN, FSAS, FFTformer, from_spectra, spectra
from tests.model.backbones.checks import (
    assert_learns_with_the_prior,
    assert_official,
    assert_recomputed,
    assert_traced_whole,
)
from tests.model.models import SMALL


def test_names_and_outputs_are_the_official_ones():
    def build(bias, **config):
        assert bias is False
        return FFTformer(**config)

    assert_official("fftformer", build, lambda network, image: network(image))


def test_the_unused_entry_of_the_release_is_kept_and_never_trained():
    network = FFTformer(**SMALL["fftformer"])
    assert "reduce_chan_level2.weight" in network.state_dict()
    assert "reduce_chan_level2.weight" not in dict(network.named_parameters())


def test_the_product_of_spectra_is_the_circular_convolution_of_every_patch():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 8, 16, generator=generator) for _ in range(2))
    both = spectra(torch.cat([a, b], dim=1))
    product = from_spectra(both[:, :3] * both[:, 3:])
    expected = torch.zeros_like(a)
    for patch in (slice(0, 8), slice(8, 16)):
        for y in range(8):
            for x in range(8):
                moved = b[..., patch].roll((y, x), dims=(2, 3))
                expected[..., patch] += a[..., patch][:, :, y, x, None, None] * moved
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [lambda: FSAS(4), lambda: DFFN(4, 3)])
def test_a_patch_sees_no_further_than_one_pixel_into_the_next(block):
    """Its spectra are its own; a 3×3 convolution before (attention) or after (feed-forward) joins the neighbours."""
    torch.manual_seed(0)
    network, x = block(), torch.randn(1, 4, 8, 24)
    if isinstance(network, DFFN):
        torch.nn.init.normal_(network.fft)  # all ones when new, which is the identity
    moved = x.clone()
    moved[..., 22:] += 1  # inside the third patch
    changed = (network(moved) - network(x)).abs().amax(dim=(0, 1, 2)) > 1e-6
    assert changed[16:].all()
    assert not changed[:15].any()


def test_a_batch_is_learned_with_the_prior():
    assert_learns_with_the_prior("fftformer", pixel="l1")


def test_it_is_traced_whole():
    assert_traced_whole(FFTformer(dim=4, num_blocks=(0, 0, 0), num_refinement_blocks=1), 32)


def test_it_is_recomputed():
    assert_recomputed(FFTformer(**SMALL["fftformer"]), 32)


def test_settings_that_make_no_network_are_refused():
    with pytest.raises(ValueError, match="three levels"):
        FFTformer(num_blocks=(6, 6, 12, 8))
