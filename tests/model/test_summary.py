"""Counts of parameters and multiply-accumulates: exact, by part, without computing anything."""

import torch

from model.summary import summarize
from tests.model.models import RANDOM, deblurrer

OPTIONS = {"backbone": {"name": "unet", "width": 8, "blocks": [1, 1, 1]}, "teacher": RANDOM, "spe": {"dim": 16}}


def test_a_convolution_counts_as_its_formula():
    counts = summarize(torch.nn.Conv2d(3, 8, 3, padding=1), (10, 20))
    assert (counts.parameters, counts.macs) == (8 * 28, 8 * 27 * 10 * 20)


def test_parts_add_up_and_the_meta_device_agrees():
    model = deblurrer(**OPTIONS)
    before = [p.clone() for p in model.parameters()]
    counts = summarize(model, (64, 64))
    with torch.device("meta"):
        assert summarize(deblurrer(**OPTIONS), (64, 64)) == counts
    assert counts.parameters == sum(p.numel() for p in model.parameters()) == counts.trainable
    assert [sum(column) for column in zip(*counts.parts.values(), strict=True)] == [counts.parameters, counts.macs]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.training


def test_an_embedding_is_charged_for_its_products():
    model = deblurrer(**OPTIONS | {"spe": {"dim": 16, "points": ["bottleneck"]}})
    channels, stride = model.backbone.embed_points["bottleneck"]
    pixels, D, G = (64 // stride) ** 2, 16, 4
    projections = sum(c * (D + G) * (64 // s) ** 2 for c, s in zip(model.prior.channels, (4, 8, 16, 32), strict=True))
    grams = pixels * (channels**2 + channels * D + D**2 + 2 * channels * D)
    assert summarize(model, (64, 64)).parts["spe"][1] == projections + grams


def test_attention_counts_both_its_products():
    class Attention(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            rows = image.flatten(0, 1)[None]  # [1, 3, H, W]: H vectors of W numbers, three heads
            return torch.nn.functional.scaled_dot_product_attention(rows, rows, rows)

    assert summarize(Attention(), (10, 16)).macs == 2 * 3 * 10 * 10 * 16
