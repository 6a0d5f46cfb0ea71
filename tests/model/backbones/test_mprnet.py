"""MPRNet: the official network's names and outputs, its patches, and what it does with a prior."""

import pytest
import torch

from model.backbones.mprnet import MPRNet, halves_of_quarters, join, split
from tests.model.backbones.checks import (
    assert_learns_with_the_prior,
    assert_official,
    assert_traced_whole,
    parameters_and_macs,
)
from tests.model.models import SMALL


def test_names_and_outputs_are_the_official_ones_whose_order_is_the_reverse():
    assert_official("mprnet", MPRNet, lambda network, image: network(image)[::-1])


def test_the_defaults_are_the_paper_s():
    with torch.device("meta"):
        assert parameters_and_macs(MPRNet()) == (pytest.approx(20.1, abs=0.05), pytest.approx(759, abs=1))


def test_patches_are_cut_and_joined_where_they_were():
    x = torch.arange(2 * 3 * 4 * 8).view(2, 3, 4, 8)
    top, bottom = x[:, :, :2], x[:, :, 2:]
    assert torch.equal(split(x, 2, 1), torch.cat([top, bottom]))
    quarters = [half[..., columns] for half in (top, bottom) for columns in (slice(4), slice(4, 8))]
    assert torch.equal(split(x, 2, 2), torch.cat(quarters))
    assert torch.equal(halves_of_quarters(split(x, 2, 2)), split(x, 2, 1))
    assert torch.equal(join(split(x, 2, 2), 2, 2), x)


def test_one_prelu_serves_all_blocks():
    network = MPRNet(**SMALL["mprnet"])
    slopes = [value for key, value in network.state_dict(keep_vars=True).items() if value.shape == (1,)]
    assert len(slopes) > 20
    assert all(slope is slopes[0] for slope in slopes)


def test_a_batch_is_learned_with_the_prior_from_all_outputs():
    assert_learns_with_the_prior("mprnet", pixel="charbonnier", frequency=0, terms={"edge": 0.05})


def test_it_is_traced_whole():
    assert_traced_whole(MPRNet(**SMALL["mprnet"]), 16)


def test_settings_that_make_no_network_are_refused():
    with pytest.raises(ValueError, match="got n_feat 2, reduction 4"):
        MPRNet(n_feat=2)
    with pytest.raises(ValueError, match="odd kernel_size"):
        MPRNet(kernel_size=2)
