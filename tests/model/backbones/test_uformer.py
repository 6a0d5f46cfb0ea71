"""Uformer: the official network's names and outputs, its shifted windows, and what it does with a prior."""

import pytest
import torch

from model.backbones.uformer import LeWinTransformerBlock, Uformer
from tests.model.backbones.checks import (
    assert_learns_with_the_prior,
    assert_official,
    assert_recomputed,
    assert_traced_whole,
)
from tests.model.models import SMALL


def test_names_and_outputs_are_the_official_ones():
    def build(token_projection, token_mlp, modulator, shift_flag, **config):
        assert (token_projection, token_mlp, modulator, shift_flag) == ("linear", "leff", True, True)
        return Uformer(**config)

    assert_official("uformer", build, lambda network, image: network(image))


def everywhere(block: LeWinTransformerBlock, x: torch.Tensor) -> torch.Tensor:
    """The block's attention over all tokens at once: those of other windows, borders cut off, get no weight."""
    height, width, dim = x.shape
    side, shift = block.side, block.shift
    row, column = (t.flatten() for t in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    window = (row - shift).div(side, rounding_mode="floor") * 1000 + (column - shift).div(side, rounding_mode="floor")
    place = (row - shift) % side * side + (column - shift) % side
    attn = block.attn
    tokens = x.reshape(-1, dim) + block.modulator.weight[place]
    heads = attn.qkv.heads
    q = attn.qkv.to_q(tokens).view(-1, heads, dim // heads)
    k, v = attn.qkv.to_kv(tokens).view(-1, 2, heads, dim // heads).unbind(1)
    logits = torch.einsum("ihd,jhd->hij", q, k) * (dim // heads) ** -0.5
    down = (row[:, None] - row[None, :]).clamp(1 - side, side - 1) + side - 1
    right = (column[:, None] - column[None, :]).clamp(1 - side, side - 1) + side - 1
    logits = logits + attn.relative_position_bias_table[down * (2 * side - 1) + right].permute(2, 0, 1)
    logits = logits.masked_fill(window[:, None] != window[None, :], -torch.inf)
    out = torch.einsum("hij,jhd->ihd", logits.softmax(-1), v).reshape(-1, dim)
    return attn.proj(out).view(x.shape)


@pytest.mark.parametrize("shift", [0, 2])
def test_windows_moved_by_half_do_not_reach_across_the_border(shift):
    torch.manual_seed(0)
    block = LeWinTransformerBlock(8, 2, 4, shift, True).double()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(2, 8, 12, 8, dtype=torch.float64)
    expected = torch.stack([everywhere(block, each) for each in x])
    torch.testing.assert_close(block._attend(x), expected)


def test_every_second_block_is_shifted_unless_the_map_is_one_window():
    def shifts(**settings: int) -> list[list[int]]:
        with torch.device("meta"):
            network = Uformer(embed_dim=1, depths=(2,) * 9, **settings)
        return [[block.shift for block in stage.blocks] for stage in (network.encoderlayer_3, network.conv)]

    assert shifts() == [[0, 4], [0, 4]]
    assert shifts(img_size=128) == [[0, 4], [0, 0]]


def test_a_batch_is_learned_with_the_prior():
    assert_learns_with_the_prior("uformer", pixel="charbonnier", frequency=0)


def test_it_is_traced_whole():
    assert_traced_whole(Uformer(embed_dim=4, depths=(0,) * 7 + (2, 0), win_size=2), 32)


def test_it_is_recomputed():
    assert_recomputed(Uformer(**SMALL["uformer"]), 32)


def test_settings_that_make_no_network_are_refused():
    with pytest.raises(ValueError, match="nine depths"):
        Uformer(depths=(1, 2, 8, 8))
