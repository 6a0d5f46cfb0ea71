"""Restormer: the official network's names and outputs, its attention, and what it does with a prior."""

import pytest
import torch
import torch.nn.functional as F

from model.backbones.restormer import Attention, Restormer
from tests.model.backbones.checks import (
    assert_learns_with_the_prior,
    assert_official,
    assert_recomputed,
    assert_traced_whole,
)
from tests.model.models import SMALL


def test_names_and_outputs_are_the_official_ones():
    def build(bias, LayerNorm_type, **config):
        assert (bias, LayerNorm_type) == (False, "WithBias")
        return Restormer(**config)

    assert_official("restormer", build, lambda network, image: network(image))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_is_the_paper_s_formula(layout):
    """Equations 1 and the text around it, written out: rows of unit length, A v, then the projection."""
    torch.manual_seed(0)
    attention = Attention(12, 3).double()
    with torch.no_grad():
        attention.temperature.copy_(torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1))
    x = torch.randn(2, 12, 6, 8, dtype=torch.float64).to(memory_format=layout)
    q, k, v = (t.reshape(2, 3, 4, 48) for t in attention.qkv_dwconv(attention.qkv(x)).chunk(3, dim=1))
    weights = (attention.temperature * (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT)).softmax(-1)
    expected = attention.project_out((weights @ v).reshape(2, 12, 6, 8))
    out = attention(x)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=layout)


def test_fp16_does_not_overflow_and_a_feature_of_zeros_gives_zeros():
    """Products of values of 8 summed over 64² pixels are four times fp16's largest number."""
    torch.manual_seed(0)
    attention = Attention(4, 1).half()
    ones = torch.full((1, 4, 64, 64), 8.0, dtype=torch.float16)
    assert attention._attention(ones, ones).sub(0.25).abs().max() < 1e-3
    zeros = torch.zeros(1, 4, 8, 8, dtype=torch.float16, requires_grad=True)
    out = attention(zeros)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert zeros.grad.isfinite().all()


def test_a_batch_is_learned_with_the_prior():
    assert_learns_with_the_prior("restormer", pixel="l1", frequency=0)


def test_it_is_traced_whole():
    assert_traced_whole(Restormer(dim=8, num_blocks=(0, 0, 0, 1), num_refinement_blocks=0), 16)


def test_it_is_recomputed():
    assert_recomputed(Restormer(**SMALL["restormer"]), 16)


@pytest.mark.parametrize(
    ("settings", "said"), [({"num_blocks": (1, 1)}, "four levels"), ({"dim": 6, "heads": (1, 2, 4, 5)}, "heads divide")]
)
def test_settings_that_make_no_network_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Restormer(**settings)
