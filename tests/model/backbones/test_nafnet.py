"""NAFNet: the official network's names and outputs, and what it does with a prior."""

import pytest
import torch

from model.backbones.nafnet import NAFBlock, NAFNet
from tests.model.backbones.checks import (
    assert_learns_with_the_prior,
    assert_official,
    assert_recomputed,
    assert_traced_whole,
)
from tests.model.models import SMALL


def test_names_and_outputs_are_the_official_ones():
    def build(img_channel, **config):
        assert img_channel == 3
        return NAFNet(**config)

    assert_official("nafnet", build, lambda network, image: network(image))


def test_a_fresh_block_is_the_identity():
    x = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(NAFBlock(4)(x), x)


def test_a_batch_is_learned_with_the_prior():
    assert_learns_with_the_prior("nafnet", pixel="charbonnier", frequency=0)


def test_it_is_traced_whole():
    assert_traced_whole(NAFNet(width=4, enc_blk_nums=(1,), dec_blk_nums=(0,), middle_blk_num=0), 8)


def test_it_is_recomputed():
    assert_recomputed(NAFNet(**SMALL["nafnet"]), 16)


def test_settings_that_make_no_network_are_refused():
    with pytest.raises(ValueError, match="as many decoder as encoder levels"):
        NAFNet(enc_blk_nums=(1, 1), dec_blk_nums=(1,))
