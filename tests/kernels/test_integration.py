"""The operators inside PyTorch: opcheck, compile, export, autocast, checkpointing, DDP, ZeRO-3; index width."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels.attention.algebra import Weights, gram_size
from kernels.cases import aggregation_case, attention_case, call_aggregation, call_attention
from kernels.runtime import as_plane, needs_int64, splits_over_pixels
from model.spe import SemanticPriorEmbedding

ROOT = Path(__file__).parents[2]


def spe_and_inputs(dtype=torch.float32):
    torch.manual_seed(0)
    spe = SemanticPriorEmbedding([6, 10], channels=24, dim=16, groups=4, heads=3).to(dtype)
    torch.nn.init.normal_(spe.attend.scale)
    rng = torch.Generator().manual_seed(1)
    levels = [torch.randn(2, c, s, s + 1, generator=rng).to(dtype) for c, s in ((6, 6), (10, 3))]
    return spe, torch.randn(2, 24, 9, 7, generator=rng).to(dtype), levels


def results(function, spe, x, levels):
    """Output, then the gradients of x, the levels and all parameters."""
    leaves = [t.detach().requires_grad_() for t in (x, *levels)]
    out = function(leaves[0], leaves[1:])
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [*leaves, *spe.parameters()])]


@pytest.mark.parametrize("channels_last", [False, True])
def test_registered_operators_pass_opcheck(channels_last):
    x, p, weights = attention_case((2, 8, 5, 3), 6, 2, channels_last=channels_last)
    ops = torch.ops.sharpprior
    torch.library.opcheck(ops.semantic_attention.default, (x, p, *weights, 1e-6, False))
    state = torch.rand(2, 15), torch.rand(2, 15), torch.rand(2, gram_size(8, 6))
    torch.library.opcheck(ops.semantic_attention_backward.default, (x, x, p, *weights, *state, False))
    values, logits = aggregation_case(2, 6, 3, [(4, 3), (2, 2)], channels_last=channels_last)
    torch.library.opcheck(ops.aggregate_levels.default, (values, logits, 5, 4, False))
    dp, lse = torch.rand(2, 6, 5, 4), torch.rand(2, 3, 5, 4)
    torch.library.opcheck(ops.aggregate_levels_backward.default, (dp, values, logits, lse, False))


def test_compiled_whole_graph_equals_eager_forward_and_backward():
    spe, x, levels = spe_and_inputs()
    compiled = torch.compile(spe, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(spe, spe, x, levels), results(compiled, spe, x, levels), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_compiled_graph_takes_new_sizes_without_falling_apart():
    spe, x, levels = spe_and_inputs()
    compiled = torch.compile(spe, fullgraph=True, backend="aot_eager")
    for crop in (9, 7):
        part = x[:, :, :crop].contiguous()
        torch._dynamo.mark_dynamic(part, 2)
        with torch.no_grad():
            torch.testing.assert_close(compiled(part, levels), spe(part, levels), rtol=0, atol=0)


def test_exported_program_equals_eager():
    spe, x, levels = spe_and_inputs()
    program = torch.export.export(spe, (x, levels))
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    names = {str(node.target) for graph in graphs for node in graph.nodes}
    assert {"sharpprior.semantic_attention.default", "sharpprior.aggregate_levels.default"} <= names
    torch.testing.assert_close(program.module()(x, levels), spe(x, levels), rtol=0, atol=0)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_features_dtype_and_fp32_weights_gradients(x_dtype):
    spe, x, levels = spe_and_inputs()
    exact = spe(x, levels)
    with torch.autocast("cpu", torch.bfloat16):
        out = spe(x.to(x_dtype), levels)
    assert out.dtype == x_dtype
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in spe.parameters())
    assert (out - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    spe, x, levels = spe_and_inputs()

    def rerun(feature, maps):
        return checkpoint(lambda f, *m: spe(f, m), feature, *maps, use_reentrant=reentrant)

    leaves = [t.detach().requires_grad_() for t in (x, *levels)]
    rerun(leaves[0], leaves[1:]).square().sum().backward()
    expected = results(spe, spe, x, levels)[1:]
    got = [t.grad for t in leaves] + [p.grad for p in spe.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_forward_saves_nothing_of_the_features_size_but_its_inputs():
    x, p, weights = attention_case((1, 32, 40, 40), 16, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call_attention(x.requires_grad_(), p.requires_grad_(), weights)
    large = [t for t in kept if t.numel() >= 4 * 40 * 40]
    assert {t.data_ptr() for t in large} == {x.data_ptr(), p.data_ptr()}
    values, logits = aggregation_case(1, 32, 2, [(10, 10), (5, 5)])
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call_aggregation([v.requires_grad_() for v in values], logits, (40, 40))
    assert sum(t.numel() for t in kept) <= sum(t.numel() for t in (*values, *logits)) + 2 * 40 * 40


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_processes_train_as_one(strategy, tmp_path):
    """Losses of two ranks on halves of a batch equal those of one process on all of it."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    script = str(Path(__file__).with_name("two_ranks.py"))
    done = subprocess.run(
        [sys.executable, script, strategy, str(tmp_path)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def test_index_width_follows_the_extent_of_one_sample():
    def meta(channels, height, width, layout=torch.contiguous_format):
        plane = torch.empty(1, channels, height, width, device="meta", memory_format=layout)
        return plane.flatten(2)

    assert not needs_int64(meta(64, 4096, 4096))  # 2^30
    assert needs_int64(meta(64, 8192, 6144))  # 3·2^30 > 2^31
    assert needs_int64(meta(64, 8192, 6144, torch.channels_last))
    assert not needs_int64(meta(512, 2048, 2048))  # exactly 2^31 elements: the last offset is 2^31 − 1
    assert needs_int64(meta(512, 2048, 2049))
    assert not needs_int64(torch.empty(4096, 64, 1024, device="meta"))  # the batch's offset is 64-bit always
    assert needs_int64(meta(16, 8, 8), meta(64, 8192, 6144))


def test_splits_cover_every_pixel_once():
    for pixels in (1, 15, 64, 65, 4097, 1 << 20):
        for batch in (1, 7, 64):
            splits, steps = splits_over_pixels(pixels, batch, 64)
            assert splits * steps * 64 >= pixels > (splits - 1) * steps * 64


def test_planes_are_copied_only_when_rows_do_not_follow_each_other():
    x = torch.empty(2, 8, 6, 10)
    for view in (
        x,
        x[:, 2:5],
        x[1:],
        x[:, :, 2:4],
        x.contiguous(memory_format=torch.channels_last),
        x.expand(2, 8, 6, 10),
    ):
        assert as_plane(view).data_ptr() == view.data_ptr()
    for view in (x[..., 1:], x[..., ::2], x.transpose(2, 3)):
        assert as_plane(view).is_contiguous()


def test_weights_tuple_follows_the_public_order():
    assert Weights._fields[0] == "norm_weight"
    assert len(Weights._fields) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_inside_an_autocast_region_equals_one_outside(dtype):
    torch.manual_seed(0)
    spe = SemanticPriorEmbedding((8, 12), 16, 16, 4, 4)
    torch.nn.init.normal_(spe.attend.scale)
    x, levels = torch.randn(2, 16, 9, 7), [torch.randn(2, 8, 5, 4), torch.randn(2, 12, 3, 2)]

    def gradients(inside: bool) -> list[torch.Tensor]:
        spe.zero_grad()
        with torch.autocast("cpu", dtype):
            y = spe(x, levels)
            if inside:
                y.float().square().sum().backward()
        if not inside:
            y.float().square().sum().backward()
        return [parameter.grad.clone() for parameter in spe.parameters()]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
