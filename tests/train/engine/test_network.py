"""Recomputed blocks, channels last and torch.compile change how a network is run, not what it computes."""

import shutil

import pytest
import torch
from torch import Tensor, nn

from model.deblurrer import Deblurrer
from tests.model.models import RANDOM, SMALL, deblurrer
from train.config.schema import EngineSection
from train.engine.network import blocks, recompute_blocks, refuse_compile, shape_network

CPU = torch.device("cpu")


def network() -> Deblurrer:
    """A small deblurrer whose embedding and output are not at their identity."""
    found = deblurrer(
        backbone={"name": "unet", "width": 8, "blocks": [1, 1]}, levels=2, teacher=RANDOM, student={"width": 8},
        spe={"dim": 8},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.spe.parameters():
            parameter.normal_(std=0.3, generator=generator)
        found.backbone.leave.weight.normal_(std=0.05, generator=generator)
    found.prior.statistics.update([torch.randn(2, c, 4, 4, generator=generator) for c in found.prior.channels])
    found.prior.statistics.freeze()
    found.calibrate(found.prior.statistics, [image()])
    return found


def image(side: int = 64) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def loss_and_gradients(module: nn.Module) -> tuple[float, dict[str, Tensor]]:
    out = module(image())
    loss = out.restored[0].square().mean() + sum(level.square().mean() for level in out.prior)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def kept_bytes(module: nn.Module) -> int:
    """Bytes that autograd keeps of a forward pass."""
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = module(image())
    assert out.restored
    return sum(seen.values())


def test_recomputed_blocks_give_the_same_bits_from_less_memory():
    plain, recomputed = network(), network()
    assert recompute_blocks(recomputed) > 5
    loss, gradients = loss_and_gradients(plain)
    found_loss, found = loss_and_gradients(recomputed)
    assert found_loss == loss
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())
    assert kept_bytes(recomputed) < 0.6 * kept_bytes(plain)


def test_blocks_are_residual_blocks_of_both_networks_and_embeddings():
    names = [name for name, _ in blocks(network())]
    assert {"backbone.encoder.0.0", "backbone.bottleneck.0", "spe.bottleneck"} <= set(names)
    assert any(name.startswith("prior.student.net.") for name in names)
    assert not any(other.startswith(f"{name}.") for name in names for other in names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mimounet", ["Encoder.0.layers.0", "Decoder.2.layers.0", "AFFs.0"]),
        ("mprnet", ["shallow_feat1.1", "stage1_encoder.encoder_level1.0", "stage3_orsnet.orb3.body.0"]),
        ("stripformer", ["encoder.en_layer1_2", "Trans_block_1", "decoder.de_block_1", "decoder.de_layer1_2"]),
    ],
)
def test_blocks_of_a_backbone_with_names_of_its_own(name, expected):
    backbone = {"name": name, **SMALL[name]}
    plain, recomputed = (deblurrer(backbone=backbone, prior=False) for _ in range(2))
    names = [block for block, _ in blocks(plain)]
    assert {f"backbone.{block}" for block in expected} <= set(names)
    assert not any(other.startswith(f"{block}.") for block in names for other in names)
    recompute_blocks(recomputed)
    for module in (plain, recomputed):
        sum(out.square().mean() for out in module(image(16)).restored).backward()
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_frozen_blocks_are_not_recomputed():
    module = network()
    module.prior.student.requires_grad_(False)
    assert not any(name.startswith("prior.student") for name, _ in blocks(module))


def test_a_network_without_blocks_is_told():
    with pytest.raises(ValueError, match=r"engine\.checkpointing: this network has no blocks"):
        recompute_blocks(nn.Conv2d(3, 3, 1))


def test_recomputed_blocks_do_nothing_without_gradients():
    module = network()
    recompute_blocks(module)
    with torch.no_grad():
        assert torch.equal(module(image()).restored[0], network()(image()).restored[0])


def test_names_of_parameters_stay():
    module = network()
    names = list(module.state_dict())
    shape_network(module, EngineSection(checkpointing=True, channels_last=True), CPU)
    assert list(module.state_dict()) == names


def test_channels_last_gives_the_same_losses_and_gradients():
    plain, last = network(), network()
    shape_network(last, EngineSection(channels_last=True), CPU)
    layouts = []
    last.backbone.down[0].register_forward_hook(
        lambda module, inputs, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    loss, gradients = loss_and_gradients(plain)
    found_loss, found = loss_and_gradients(last)
    assert layouts == [True]
    assert found_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item() + 1e-7), name


@pytest.mark.parametrize(
    ("given", "device", "expected"),
    [("auto", "cpu", False), ("auto", "cuda", True), (True, "cpu", True), (False, "cuda", False)],
)
def test_channels_last_is_the_default_of_gpus_alone(given, device, expected):
    module = nn.Conv2d(3, 3, 1)
    shape_network(module, EngineSection(channels_last=given), torch.device(device))
    assert bool(module._forward_pre_hooks) is expected


def test_compile_without_a_compiler_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", (None, str(tmp_path / "absent")))
    for name in ("get_cpp_compiler", "cpp_compiler_search", "check_compiler_exist_windows"):
        getattr(getattr(cpp_builder, name, None), "cache_clear", lambda: None)()
    with pytest.raises(ValueError, match=r"engine\.compile needs a C\+\+ compiler"):
        refuse_compile(CPU)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_a_compiled_network_computes_the_same_and_other_sizes_do_not_compile_forever():
    torch._dynamo.reset()
    module = deblurrer(backbone={"name": "unet", "width": 4, "blocks": [1, 1]}, prior=False)
    compiled = deblurrer(backbone={"name": "unet", "width": 4, "blocks": [1, 1]}, prior=False)
    with torch.no_grad():
        for net in (module, compiled):
            net.backbone.leave.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    compiled.compile(backend=count, dynamic=None)
    for side in (64, 64, 96, 128, 70, 81):
        assert torch.allclose(compiled(image(side)).restored[0], module(image(side)).restored[0], atol=1e-5)
    assert len(graphs) <= 4
