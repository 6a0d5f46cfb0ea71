"""Routes: what `auto` takes, that every route computes the same, what is recorded, and that graphs stay whole."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import compiled, routes
from kernels.attention import configs
from kernels.cases import aggregation_case, attention_case, call_aggregation, call_attention
from kernels.routes import AggregationCase, AttentionCase, record, use
from kernels.runtime import INTERPRETING, choose
from model.spe import SemanticPriorEmbedding

pytestmark = pytest.mark.skipif(INTERPRETING, reason="about the choice, not the kernels")
ATTENTION = AttentionCase(2, 24, 5, 3, 16, 4, "float32")
AGGREGATION = AggregationCase(2, 16, 5, 3, 4, ((4, 2), (2, 2)), "float32")


@pytest.fixture(autouse=True)
def nothing_chosen():
    yield
    use({})


def fake(device: str, dtype=torch.float32):
    with FakeTensorMode():
        return torch.empty(1, 4, 2, 2, device=device, dtype=dtype)


def test_without_a_choice_the_device_decides():
    assert choose("auto", fake("cpu")) == "reference"
    assert choose("auto", fake("cuda")) == "triton"
    assert choose("auto", fake("cuda"), ["too wide"]) == "composed", "the chunked reference is for CPUs"
    assert choose("auto", fake("cuda", torch.float64)) == "composed"


def test_a_choice_is_taken_on_any_device_and_a_named_one_wins():
    for device in ("cpu", "cuda"):
        assert choose("auto", fake(device), chosen="composed") == "composed"
        assert choose("reference", fake(device), chosen="composed") == "reference"
    assert choose("auto", fake("cuda"), chosen="triton-tiled") == "triton"
    with pytest.raises(ValueError, match="the kernels need a CUDA or ROCm GPU"):
        choose("auto", fake("cpu"), chosen="triton-tiled")
    with pytest.raises(ValueError, match="'fast' is unknown"):
        choose("fast", fake("cpu"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("impl", ["composed", "compiled"])
def test_every_route_computes_the_same(impl, channels_last, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_eagerly(f, **options))
    x, p, weights = attention_case((2, 24, 5, 3), 16, 4, channels_last=channels_last)
    torch.testing.assert_close(call_attention(x, p, weights, impl=impl), call_attention(x, p, weights))
    values, logits = aggregation_case(2, 16, 4, [(4, 2), (2, 2)], channels_last=channels_last)
    torch.testing.assert_close(
        call_aggregation(values, logits, (5, 3), impl=impl), call_aggregation(values, logits, (5, 3))
    )


compile_for_real = torch.compile


def compile_eagerly(function, **options):
    """torch.compile without a code generator: seconds less, the same graphs."""
    return compile_for_real(function, backend="eager", **options)


def test_more_shapes_than_dynamo_recompiles_are_all_compiled(monkeypatch):
    compiled._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    with torch._dynamo.config.patch(recompile_limit=1):
        for side in (2, 3):
            x, p, weights = attention_case((1, 8, side, 3), 4, 2)
            leaf = x.requires_grad_()
            out = call_attention(leaf, p, weights, impl="compiled")  # fullgraph: past the limit it would raise
            (grad,) = torch.autograd.grad(out.sum(), leaf)
            assert grad.isfinite().all()
    compiled._compiled.cache_clear()


def test_a_choice_is_what_auto_runs_until_it_is_taken_back(monkeypatch):
    import kernels.attention.api as api

    taken, plain = [], api.composed_attention
    monkeypatch.setattr(api, "composed_attention", lambda *a: taken.append(a[0].shape) or plain(*a))
    inputs = attention_case((1, 24, 4, 4), 16, 4)
    call_attention(*inputs)
    use({ATTENTION: "composed"})
    call_attention(*inputs)
    call_attention(*inputs, impl="reference")
    use({})
    call_attention(*inputs)
    assert taken == [(1, 24, 4, 4)]


def test_the_tiled_route_reaches_the_launch_table():
    use({ATTENTION: "triton-tiled"})
    assert list(configs.TILED_GROUPS) == [(24, 16, torch.float32)]
    assert not configs.fused("gram", 24, 16, torch.float32)
    use({})
    assert not configs.TILED_GROUPS


def test_an_unjudged_layout_is_turned_into_the_judged_one_and_an_unjudged_group_is_composed(caplog, monkeypatch):
    use({ATTENTION: "triton"})
    dense, last = (attention_case((2, 24, 5, 3), 16, 4, channels_last=each)[0] for each in (False, True))
    with caplog.at_level(logging.WARNING):
        route, same = routes.chosen(ATTENTION.group, dense)
        assert (route, same is dense) == ("triton", True)
        route, same = routes.chosen(ATTENTION.group, torch.empty(9, 24, 7, 7))  # another size of the same group
        assert route == "triton"
        assert not caplog.records
        for _ in range(2):
            route, turned = routes.chosen(ATTENTION.group, last)
            assert route == "triton"
            assert turned.is_contiguous()
            assert torch.equal(turned, last)
            assert routes.chosen(("attention", 32, 16, torch.float32), dense)[0] == "composed"
    assert [record.getMessage() for record in caplog.records] == [
        "kernels: attention 24 16 torch.float32 channels_last was not checked before this run: it is copied to the "
        "other layout",
        "kernels: attention 32 16 torch.float32 was not checked before this run: composed runs",
    ]
    use({ATTENTION: "composed"})
    assert routes.chosen(ATTENTION.group, last)[1] is last, "plain PyTorch takes any layout"


@pytest.mark.parametrize("impl", ["reference", "composed"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_results_and_gradients_lie_as_the_first_map_whatever_the_others_do(impl, channels_last, monkeypatch):
    """So that a case has one layout: what the kernels see is what was judged."""
    from kernels.attention import reference

    seen = []
    plain = reference.gradient_pass
    monkeypatch.setattr(reference, "gradient_pass", lambda *a: seen.append([t.stride(1) for t in a[:3]]) or plain(*a))
    own, other = (torch.channels_last, torch.contiguous_format)[:: 1 if channels_last else -1]
    x, p, weights = attention_case((2, 24, 5, 3), 16, 4)
    x, p = x.contiguous(memory_format=own).requires_grad_(), p.contiguous(memory_format=other).requires_grad_()
    y = call_attention(x, p, weights, impl=impl)
    assert y.is_contiguous(memory_format=own)
    y.backward(torch.randn(y.shape).contiguous(memory_format=other))
    assert p.grad.isfinite().all()
    if impl == "reference":
        assert seen == [[1, 1, 1] if channels_last else [15, 15, 15]]
    values, logits = aggregation_case(2, 16, 4, [(4, 2), (2, 2)])
    mixed = [values[0].contiguous(memory_format=own), values[1].contiguous(memory_format=other)]
    assert call_aggregation(mixed, logits, (5, 3), impl=impl).is_contiguous(memory_format=own)


def spe_and_inputs():
    torch.manual_seed(0)
    spe = SemanticPriorEmbedding([6, 10], channels=24, dim=16, groups=4, heads=4)
    torch.nn.init.normal_(spe.attend.scale)
    return spe, torch.randn(2, 24, 5, 3), [torch.randn(2, 6, 4, 2), torch.randn(2, 10, 2, 2)]


@pytest.mark.parametrize("route", ["composed", "compiled"])
def test_a_choice_leaves_a_compiled_caller_one_graph(route):
    spe, x, levels = spe_and_inputs()
    with record() as found:
        plain = spe(x, levels)
    assert list(found) == [AGGREGATION, ATTENTION]
    use(dict.fromkeys(found, route))
    whole = torch.compile(spe, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    out = whole(x, levels)
    torch.testing.assert_close(out, plain)
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    use({})  # the graph knows that the choice changed
    torch.testing.assert_close(whole(x.detach(), levels), plain, rtol=0, atol=0)


def test_recording_sees_calls_on_tensors_without_memory():
    with FakeTensorMode():
        spe, x, levels = spe_and_inputs()
        x = x.contiguous(memory_format=torch.channels_last)
        with record() as found:
            spe(x, levels)
            spe(x, levels)
        spe(x[:1], [level[:1] for level in levels])
    assert [str(case) for case in found] == [
        "aggregation 2×16×5×3 of levels 4×2 2×2, 4 groups, float32, NCHW",
        "attention 2×24×5×3, D 16, heads 4, float32, channels_last",
    ]


def test_a_route_of_another_name_is_refused():
    with pytest.raises(ValueError, match="'fast' is unknown"):
        routes.use({ATTENTION: "fast"})


def test_in_a_block_of_composed_nothing_but_plain_operators_is_taken():
    image = torch.zeros(1, 8, 4, 4)
    group = ("attention", 8, 4, torch.float32)
    assert routes.chosen(group, image)[0] is None
    with routes.composed():
        assert routes.chosen(group, image)[0] == "composed"
        with routes.composed():
            pass
        assert routes.chosen(group, image)[0] == "composed"
    assert routes.chosen(group, image)[0] is None
