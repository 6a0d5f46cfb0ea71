"""16-bit arithmetic: what is averaged, what an overflow does, what stays in fp32, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from train.config.file import load_config
from train.config.schema import Config
from train.engine.network import shape_network
from train.engine.precision import keep_depthwise_in_fp32, refuse_precision, use_sixteen_bit_parameters
from train.engine.settings import deepspeed_settings

CPU, BF16 = torch.device("cpu"), Config(engine={"precision": "bf16"}).engine
WORKER = Path(__file__).parents[1] / "workers" / "precision.py"


@pytest.fixture(scope="module")
def found() -> dict:
    """What two ranks found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_runs_average_the_fp32_master_weights(found, stage):
    result = found[f"averages/{stage}"]
    assert result["error"] < 1e-6
    assert result["coarse"] > 1e-4  # an average of the rounded parameters is another one
    assert result["elements"] == 3 * 7 * 9 + 7 + 14 + 7 * 9 + 1  # every element once, over the ranks


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_module_computes_with_the_average_and_gets_its_weights_back(found, stage):
    result = found[f"averages/{stage}"]
    assert result["moved"]
    assert result["restored"]
    assert result["forward"] < 0.02  # of outputs about 1: bf16's rounding


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_whose_gradients_overflow_in_fp16_moves_nothing_and_halves_the_scale(found, stage):
    one, other = found[f"overflow/{stage}"]
    assert one == other  # only one rank's gradients overflow, both leave the step out
    left_out = [step[0] for step in one]
    assert left_out[0]
    assert not left_out[-1]
    scale = 2.0**16
    for skipped, moved, found_scale in one:
        scale /= 2 if skipped else 1
        assert (moved, found_scale) == (not skipped, scale)


def test_fp16_is_refused_where_deepspeed_cannot(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    engine = Config(engine={"precision": "fp16", "zero": 1}).engine
    with pytest.raises(ValueError, match=r"fp16: DeepSpeed does not support it on this CPU: use fp32 or bf16"):
        refuse_precision(engine, torch.device("cpu"))


@pytest.mark.parametrize("precision", ["bf16", "bf16_params"])
def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch, precision):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    engine = Config(engine={"precision": precision, "zero": 1}).engine
    with pytest.raises(ValueError, match=r"GPU \(Tesla V100\) computes no bf16: use fp16 or fp32"):
        refuse_precision(engine, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("zero=0 precision=bf16_params", "precision bf16_params needs zero 1, 2 or 3"),
        ("zero=0 precision=fp16", "precision fp16 needs zero 1, 2 or 3"),
        ("zero=0 offload=cpu", "offload cpu needs zero 1, 2 or 3"),
        ("zero=0 overlap_comm=true", "overlap_comm true needs zero 1, 2 or 3"),
        ("zero=2 offload_parameters=cpu", "offload_parameters cpu needs zero 3: zero 2 keeps whole parameters"),
        ("zero=1 precision=bfloat16", "precision"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(tmp_path, settings, reason):
    (tmp_path / "a.yaml").write_text("{}\n")
    with pytest.raises(ValueError, match=reason):
        load_config(str(tmp_path / "a.yaml"), [f"engine.{setting}" for setting in settings.split()])


@pytest.mark.parametrize(
    "key", ["bf16", "fp16", "torch_autocast", "optimizer", "gradient_clipping", "train_batch_size"]
)
def test_a_deepspeed_setting_that_has_a_field_of_ours_is_refused(key):
    with pytest.raises(ValueError, match=rf"engine\.deepspeed\.{key} is set by the configuration's own fields"):
        deepspeed_settings(Config(engine={"deepspeed": {key: {}}}), 1)


def test_deepspeed_settings_are_merged_over_ours():
    given = {"zero_optimization": {"sub_group_size": 7}, "data_types": {"buffer_dtype": "fp32"}}
    settings = deepspeed_settings(Config(engine={"zero": 2, "precision": "bf16_params", "deepspeed": given}), 1)
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": False, "sub_group_size": 7}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32", "buffer_dtype": "fp32"}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), BatchNormAct2d(3)], ids=["torch", "timm"])
def test_batch_norm_takes_16_bit_scales_beside_fp32_statistics_and_nobody_elses_changes(norm):
    torch_own = F.batch_norm
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    network = nn.Sequential(norm).eval()
    x = torch.randn(2, 3, 4, 4, generator=generator)
    expected, names = network(x), list(network.state_dict())
    norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
    use_sixteen_bit_parameters(network, Config(engine={"precision": "bf16_params", "zero": 1}).engine, x.device)
    found = network(x.bfloat16())
    assert torch.allclose(found.float(), expected, atol=0.03)
    found.sum().backward()
    assert dict(network.named_parameters())["0.weight"].grad.dtype == torch.bfloat16
    assert list(network.state_dict()) == names
    assert F.batch_norm is torch_own


# -- depthwise convolutions under bf16 on a CPU -----------------------------------------------------------------------


def stack(depthwise: nn.Module) -> nn.Sequential:
    """Blocks around a depthwise convolution of 8 channels, weights of a fixed seed."""
    layers = [nn.Sequential(nn.Conv2d(3, 8, 1), depthwise), nn.Sequential(nn.GELU(), nn.Conv2d(8, 3, 1), nn.PReLU())]
    for layer in layers:
        layer.recompute = True
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (network := nn.Sequential(*layers)).parameters():
            parameter.normal_(std=0.5, generator=generator)
    return network


def learned(network: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output under bf16 autocast, and all gradients."""
    x = torch.rand(2, 3, 9, 11, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x)
    out.float().square().mean().backward()
    return out, [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
def test_a_depthwise_convolution_computes_in_fp32_and_gives_bf16(kind):
    network = stack(kind(8, 8, 3, padding=1, stride=2, groups=8))
    names, kinds = list(network.state_dict()), [type(module) for module in network.modules()]
    assert keep_depthwise_in_fp32(network, BF16, CPU) == 1
    assert (list(network.state_dict()), [type(module) for module in network.modules()]) == (names, kinds)
    depthwise, seen = network[0][1], []
    depthwise.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].detach(), output)))
    depthwise.register_full_backward_hook(lambda _, into, out: seen.append((into[0], out[0])))
    learned(network)
    (image, output), (into, gradient) = seen
    assert image.dtype == output.dtype == into.dtype == gradient.dtype == torch.bfloat16
    plain = kind(8, 8, 3, padding=1, stride=2, groups=8)
    plain.load_state_dict({name: value.bfloat16().float() for name, value in depthwise.state_dict().items()})
    wide = image.float().requires_grad_()
    expected = plain(wide)
    assert torch.equal(output, expected.bfloat16())
    expected.backward(gradient.float())
    assert torch.equal(into, wide.grad.bfloat16())
    assert depthwise.weight.grad.dtype == torch.float32
    assert torch.equal(depthwise.weight.grad, plain.weight.grad.bfloat16().float())  # as autocast's own cast does


def test_recomputed_blocks_and_compiled_ones_keep_it_in_fp32_too():
    networks = [stack(nn.Conv2d(8, 8, 3, groups=8)) for _ in range(3)]
    for network in networks:
        shape_network(network, BF16.model_copy(update={"checkpointing": network is networks[1]}), CPU)
    assert all("forward" in vars(block) for block in networks[1])
    networks[2].compile(backend="eager", fullgraph=True)
    (out, gradients), *others = map(learned, networks)
    for found, found_gradients in others:
        assert torch.equal(found, out)
        assert all(map(torch.equal, found_gradients, gradients))


def test_the_average_and_the_evaluation_without_autocast_are_as_they_were():
    network, x = stack(nn.Conv2d(8, 8, 3, groups=8)), torch.rand(1, 3, 8, 8)
    expected = network(x)
    keep_depthwise_in_fp32(network, BF16, CPU)
    assert torch.equal(network(x), expected)


@pytest.mark.parametrize(
    ("precision", "device", "convolution"),
    [
        ("bf16", "cuda", nn.Conv2d(8, 8, 3, groups=8)),
        ("fp32", "cpu", nn.Conv2d(8, 8, 3, groups=8)),
        ("bf16_params", "cpu", nn.Conv2d(8, 8, 3, groups=8)),
        ("bf16", "cpu", nn.Conv2d(8, 8, 3, groups=2)),
        ("bf16", "cpu", nn.Conv2d(1, 8, 3)),
    ],
)
def test_nothing_else_changes(precision, device, convolution):
    engine = Config(engine={"precision": precision, "zero": 1}).engine
    assert keep_depthwise_in_fp32(convolution, engine, torch.device(device)) == 0
    assert "forward" not in vars(convolution)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_has_depthwise_convolutions_in_fp32_and_comes_to_the_same_weights(found, stage):
    result, reference = found[f"depthwise/{stage}"], found["depthwise/0"]
    assert result["depthwise"] == ["torch.float32"]
    assert result["others"] == ["torch.bfloat16"]
    weights, expected = torch.tensor(result["weights"]), torch.tensor(reference["weights"])
    # Two steps of 1e-3 a weight; where a gradient is near 0 the reduction in bf16 may turn its sign.
    assert (weights - expected).abs().max() < 5e-3
    assert (weights - expected).abs().mean() < 2e-4
