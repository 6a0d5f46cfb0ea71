"""Stripformer: the official network's names and outputs, its strips, and what it does with a prior."""

import pytest
import torch

from model.backbones.stripformer import GREY, InterSA, IntraSA, Stripformer
from tests.model.backbones.checks import (
    assert_learns_with_the_prior,
    assert_official,
    assert_traced_whole,
    parameters_and_macs,
)
from tests.model.models import SMALL


def test_names_and_outputs_are_the_official_ones_around_grey():
    """The vectors' image stands for one less 0.5, as the official scripts give it and take it back."""
    assert_official("stripformer", Stripformer, lambda network, image: [out - GREY for out in network(image + GREY)])


def test_the_defaults_are_the_paper_s():
    with torch.device("meta"):
        assert parameters_and_macs(Stripformer()) == (pytest.approx(19.7, abs=0.05), pytest.approx(154.7, abs=0.5))


@pytest.mark.parametrize("block", [IntraSA, InterSA])
def test_rows_and_columns_are_attended_to_alike(block):
    """A block whose weights along rows are those along columns, on a turned image, gives the turned result."""
    torch.manual_seed(0)
    network = block(8, 2).double()
    along, across = ("qkv_local_h", "qkv_local_v") if block is IntraSA else ("conv_h", "conv_v")
    getattr(network, across).load_state_dict(getattr(network, along).state_dict())
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    rows, columns = network.attend(x, x)
    turned_rows, turned_columns = network.attend(x.mT, x.mT)
    torch.testing.assert_close(turned_columns.mT, rows)
    torch.testing.assert_close(turned_rows.mT, columns)


def test_a_row_attends_to_itself_or_to_the_other_rows():
    x = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    moved = x.clone()
    moved[:, :, 0] += 1
    within, between = IntraSA(8, 2), InterSA(8, 2)
    assert torch.equal(within.attend(x, x)[0][:, :, 1:], within.attend(moved, x)[0][:, :, 1:])
    assert not torch.equal(between.attend(x, x)[0][:, :, 1:], between.attend(moved, x)[0][:, :, 1:])


def test_a_batch_is_learned_with_the_prior():
    assert_learns_with_the_prior("stripformer", pixel="charbonnier", frequency=0, terms={"edge": 0.05})


def test_it_is_traced_whole():
    assert_traced_whole(Stripformer(**SMALL["stripformer"]), 16)


def test_settings_that_make_no_network_are_refused():
    with pytest.raises(ValueError, match="divide 160 and 96"):
        Stripformer(heads=(7, 3))
