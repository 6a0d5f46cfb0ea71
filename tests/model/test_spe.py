"""Semantic prior embedding: a new layer changes nothing, learns at once, and owns its parameters."""

import pytest
import torch

from model.spe import MultiLevelAggregation, SemanticAttentionTransformation, SemanticPriorEmbedding


def embedding(seed: int = 0) -> SemanticPriorEmbedding:
    torch.manual_seed(seed)
    return SemanticPriorEmbedding(level_channels=[6, 10, 14], channels=24, dim=16, groups=4, heads=3)


def inputs():
    rng = torch.Generator().manual_seed(1)
    levels = [torch.randn(2, c, *size, generator=rng) for c, size in ((6, (9, 7)), (10, (5, 4)), (14, (3, 2)))]
    return torch.randn(2, 24, 11, 13, generator=rng), levels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_new_embedding_is_exactly_the_identity_and_its_scale_learns(dtype, autocast):
    layer, (x, levels) = embedding(), inputs()
    if not autocast:
        layer, levels = layer.to(dtype), [level.to(dtype) for level in levels]
    x = x.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x, levels)
    assert torch.equal(y, x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert (layer.attend.scale.grad != 0).all()


def test_every_parameter_learns_once_scale_has_left_zero():
    layer, (x, levels) = embedding(), inputs()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (layer(x, levels) - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and (p.grad != 0).any() for p in layer.parameters())


def test_update_of_a_new_layer_has_the_features_own_size():
    """With scale at one the update neither vanishes beside the feature nor drowns it."""
    layer, (x, levels) = embedding(), inputs()
    with torch.no_grad():
        layer.attend.scale.fill_(1.0)
        ratio = (layer(x, levels) - x).std() / x.std()
    assert 0.1 < ratio < 3


def test_projecting_a_level_before_sampling_equals_projecting_after():
    torch.manual_seed(0)
    mla = MultiLevelAggregation([6], dim=8, groups=2)
    level = torch.randn(1, 6, 4, 5)
    upsampled = torch.nn.functional.interpolate(level, (9, 10), mode="bilinear", align_corners=False)
    torch.testing.assert_close(mla([level], (9, 10)), mla.values[0](upsampled))


def test_every_level_starts_with_an_equal_share():
    torch.manual_seed(0)
    mla = MultiLevelAggregation([3, 5], dim=4, groups=2)
    levels = [torch.randn(1, 3, 4, 4), torch.randn(1, 5, 4, 4)]
    expected = (mla.values[0](levels[0]) + mla.values[1](levels[1])) / 2
    torch.testing.assert_close(mla(levels, (4, 4)), expected)


def test_parameters_are_plain_leaves_of_their_module():
    attend = SemanticAttentionTransformation(channels=12, dim=8, heads=2)
    assert {name for name, _ in attend.named_parameters()} == {
        "norm_weight",
        "norm_bias",
        "query_weight",
        "key_weight",
        "value_weight",
        "temperature",
        "out_weight",
        "scale",
    }
    assert sum(p.numel() for p in attend.parameters()) == 12 * 12 + 2 * 12 * 8 + 24 * 12 + 3 * 12 + 2


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: SemanticAttentionTransformation(10, 8, 3), "heads"),
        (lambda: MultiLevelAggregation([4], 8, 3), "groups"),
        (lambda: MultiLevelAggregation([], 8, 2), "level_channels"),
        (lambda: embedding()(torch.zeros(1, 24, 4, 4), [torch.zeros(1, 6, 4, 4)]), "levels"),
    ],
)
def test_bad_construction_is_named(build, name):
    with pytest.raises(ValueError, match=name):
        build()
