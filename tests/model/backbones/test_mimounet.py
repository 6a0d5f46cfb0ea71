"""MIMO-UNet: the official network's names and outputs, and what it does with a prior."""

import pytest
import torch

from model.backbones import BACKBONES, PRESETS
from model.backbones.mimounet import MIMOUNet
from tests.model.backbones.checks import (
    assert_learns_with_the_prior,
    assert_official,
    assert_traced_whole,
    parameters_and_macs,
)


def test_names_and_outputs_are_the_official_ones_in_their_order():
    assert_official("mimounet", MIMOUNet, lambda network, image: network(image))


@pytest.mark.parametrize(("preset", "millions", "macs"), [("mimo-unet", 6.8, 64), ("mimo-unet-plus", 16.1, 151)])
def test_presets_have_the_papers_sizes(preset, millions, macs):
    settings = dict(PRESETS[preset])
    with torch.device("meta"):
        network = BACKBONES[settings.pop("name")](**settings)
    assert parameters_and_macs(network) == (pytest.approx(millions, abs=0.05), pytest.approx(macs, abs=0.5))


def test_outputs_are_a_quarter_a_half_and_the_full_size():
    shapes = [tuple(out.shape) for out in MIMOUNet(num_res=1)(torch.rand(2, 3, 16, 24))]
    assert shapes == [(2, 3, 4, 6), (2, 3, 8, 12), (2, 3, 16, 24)]


def test_a_batch_is_learned_with_the_prior_from_all_outputs():
    assert_learns_with_the_prior("mimounet", pixel="l1", frequency=1.0)


def test_it_is_traced_whole():
    assert_traced_whole(MIMOUNet(num_res=1), 16)


def test_no_residual_blocks_are_refused():
    with pytest.raises(ValueError, match="num_res ≥ 1, got 0"):
        MIMOUNet(num_res=0)
