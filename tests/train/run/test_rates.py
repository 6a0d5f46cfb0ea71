"""Operations a second: counted right, by stage, without what is no work of a step; and the peaks of the table."""

import pytest
import torch
from torch import nn

from kernels import semantic_attention
from model.summary import FORMULAS
from tests.train.engine.test_network import image, network
from train.config.schema import Config
from train.run.rates import PEAKS, FlopCounter, Rates, peak_flops


def counted(function) -> int:
    with FlopCounter() as counter:
        function()
    return counter.total


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_are_counted_forward_and_for_both_gradients_depthwise_ones_too(groups, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer, x = kind(8, 16, 3, groups=groups), torch.rand(2, 8, 10, 12)
    places = 2 * 8 * 10 * 12 * 16 // groups if transposed else 2 * 16 * 8 * 10 * 8 // groups
    forward = 2 * places * 9
    assert counted(lambda: layer(x)) == forward
    assert counted(lambda: layer(x).sum().backward()) == 2 * forward  # the picture wants no gradient
    assert counted(lambda: layer(x.requires_grad_()).sum().backward()) == 3 * forward


def test_semantic_attention_s_derivative_is_counted_near_twice_its_pass():
    x, p = torch.rand(1, 8, 4, 6, requires_grad=True), torch.rand(1, 4, 4, 6, requires_grad=True)
    weights = {
        "norm_weight": torch.ones(8), "norm_bias": torch.zeros(8), "query_weight": torch.rand(8, 8),
        "key_weight": torch.rand(8, 4), "value_weight": torch.rand(8, 4), "temperature": torch.ones(2),
        "out_weight": torch.rand(16, 8), "scale": torch.ones(8),
    }  # fmt: skip
    forward = FORMULAS[torch.ops.sharpprior.semantic_attention](x.shape, p.shape)

    def passes():
        semantic_attention(x, p, **weights, heads=2).sum().backward()

    backward = 2 * 24 * (4 * 8 * 4 + 8 * 8 + 2 * 8 * 4 + 4 * 4)
    # The C×C algebra between the passes, which does not grow with the image, is counted where torch has a formula.
    assert forward + backward <= counted(passes) < 1.7 * (forward + backward)
    assert 1.2 < backward / forward < 2.2


def test_the_product_s_step_costs_three_forward_passes_but_for_the_first_layers():
    module = network().train()
    with torch.no_grad():
        forward = counted(lambda: module(image()))

    def step():
        out = module(image())
        (out.restored[0].sum() + sum(level.sum() for level in out.prior)).backward()

    assert 2.8 * forward < counted(step) < 3.0 * forward


def work() -> None:
    nn.Conv2d(1, 1, 1)(torch.rand(1, 1, 10, 10))  # 200 FLOP


def test_rates_are_of_the_first_step_of_each_stage_over_all_ranks():
    rates = Rates(Config(train={"batch": 8, "steps": 4, "distill_steps": 2}), 2, 1e6, done=0)
    found = []
    for done in range(4):
        for part in ("losses", "backward", "update"):
            with rates.counted(part):
                for _ in range(1 if done < 2 else 3):
                    work()
        found.append(rates.of(0.5))
        rates.next(done + 1)
    one = {"pairs_per_s": 16, "tflops": 2 * 400 / 0.5 / 1e12, "mfu": 2 * 400 / 0.5 / 1e6}
    assert found[0] == found[1] == pytest.approx(one)
    assert found[2] == found[3] == pytest.approx({**one, "tflops": 3 * one["tflops"], "mfu": 3 * one["mfu"]})


def test_a_cached_teacher_is_not_counted_and_nothing_is_under_compile():
    settings = {"train": {"batch": 8}, "features": {"cache": "on"}}
    rates = Rates(Config(**settings), 1, None, done=0)
    with rates.counted("losses"):
        work()
        with torch.no_grad():
            work()
    assert rates.of(1.0) == pytest.approx({"pairs_per_s": 8, "tflops": 200 / 1e12})
    for changed in ({"engine": {"compile": True}}, {"model": {"teacher": [{"name": "light", "compile": True}]}}):
        rates = Rates(Config(**settings | changed), 1, 1e12, done=0)
        with rates.counted("losses"):
            work()
        assert rates.of(1.0) == {"pairs_per_s": 8}


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bf16_params", 989e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA GH200 480GB", "bf16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("AMD Instinct MI300X", "bf16", None),
    ],
)
def test_peaks_are_those_of_the_named_gpu_and_none_of_another(monkeypatch, name, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak_flops(torch.device("cuda", 0), precision, world=4)
    assert found == (None if expected is None else pytest.approx(4 * expected))
    assert peak_flops(torch.device("cpu"), precision, 4) is None
    assert all(half > tf32 for half, tf32 in PEAKS.values())
