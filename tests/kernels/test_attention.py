"""Semantic attention against its composed fp64 form: values, gradients, layouts, limits. Run in both lanes."""

import contextlib
import re

import pytest
import torch

from kernels.attention.algebra import Weights
from kernels.attention.reference import composed_attention
from kernels.cases import attention_case, call_attention
from kernels.runtime import INTERPRETING
from tests.kernels.numerics import assert_close_as_eager, fenced_copy, with_gradients

# B, C, H, W, D, heads: odd sizes, H ≠ W, one column, one pixel, padded widths, several tiles of the kernels.
SHAPES = [
    (2, 16, 5, 7, 16, 2),
    (1, 48, 9, 1, 24, 3),
    (2, 60, 3, 11, 20, 4),
    (1, 96, 7, 6, 64, 2),
    (3, 8, 1, 1, 7, 1),
    (1, 16, 13, 7, 96, 1),
    (1, 256, 6, 5, 32, 8),
    (1, 144, 5, 9, 136, 4),
]
RMS = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-10}


def attend(impl):
    return lambda leaves: call_attention(leaves[0], leaves[1], Weights(*leaves[2:]), impl=impl)


def composed(leaves):
    return composed_attention(leaves[0], leaves[1], Weights(*leaves[2:]))


def case(shape, dtype, **options):
    *size, prior_channels, heads = shape
    x, p, weights = attention_case(tuple(size), prior_channels, heads, dtype=dtype, **options)
    return [x, p, *weights]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_composed_form_in_fp64(impl, shape, channels_last, poisoned):
    inputs = case(shape, torch.float64, channels_last=channels_last)
    for tested, exact in zip(with_gradients(attend(impl), inputs), with_gradients(composed, inputs), strict=True):
        assert (tested - exact).abs().max() <= 1e-10 * max(1.0, exact.abs().max())


DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETING else [torch.bfloat16])  # the interpreter's bf16 is wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 48, 7, 6, 24, 3), (1, 96, 8, 9, 64, 2), (1, 160, 5, 9, 40, 4)], ids=str)
def test_error_stays_near_that_of_eager(impl, shape, dtype):
    inputs = case(shape, dtype)
    exact = with_gradients(composed, [t.double() for t in inputs])
    assert_close_as_eager(
        with_gradients(attend(impl), inputs), with_gradients(composed, inputs), exact, dtype, RMS[dtype]
    )


def test_gradients_pass_gradcheck(impl):
    inputs = [t.requires_grad_() for t in case((2, 4, 2, 3, 3, 2), torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: attend(impl)(t), inputs, fast_mode=INTERPRETING)


def test_floored_rows_agree_and_stay_finite(impl):
    """Rows that vanish (a query row that only sees the mean of x̂, a null key row, a null prior) take their floor."""
    inputs = case((3, 8, 5, 5, 6, 2), torch.float64)
    x, p, weights = inputs[0], inputs[1], Weights(*inputs[2:])
    weights.norm_weight.fill_(1.0)
    weights.norm_bias.zero_()
    weights.query[0] = 1.0  # Σ_c x̂_c = 0 at every pixel
    weights.key[1] = 0.0
    p[1] = 0.0
    p[2] *= 1e-8
    for tested, exact in zip(with_gradients(attend(impl), inputs), with_gradients(composed, inputs), strict=True):
        assert tested.isfinite().all()
        assert (tested - exact).abs().max() <= 1e-9 * max(1.0, exact.abs().max())
    single = [t.float() for t in (x, p, *weights)]
    assert all(t.isfinite().all() for t in with_gradients(attend(impl), single))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_zero_scale_returns_x_bit_for_bit(impl, dtype):
    x, p, weights = attention_case((2, 48, 7, 5), 24, 3, dtype=dtype)
    weights.scale.zero_()
    out = call_attention(x, p, weights, impl=impl)
    assert torch.equal(out, x)
    assert out.dtype == dtype


@pytest.mark.parametrize("channels_last", [False, True])
def test_reads_no_element_outside_its_inputs(impl, channels_last, fences):
    inputs = case((1, 24, 5, 7, 20, 2), torch.float32, channels_last=channels_last)
    guarded = [fenced_copy(t) for t in inputs]
    for a, b in zip(with_gradients(attend(impl), inputs), with_gradients(attend(impl), guarded), strict=True):
        assert torch.equal(a, b)
    fences()


def test_strided_inputs_and_expanded_gradients_give_the_same_result(impl):
    x, p, weights = attention_case((1, 24, 4, 6), 12, 2)
    expected = with_gradients(lambda t: attend(impl)([*t, *weights]), [x, p])
    wide_x, wide_p = torch.zeros(1, 40, 4, 6), torch.zeros(1, 12, 4, 12)
    wide_x[:, 5:29], wide_p[..., ::2] = x, p
    sliced = [wide_x[:, 5:29], wide_p[..., ::2]]  # a slice of channels; every other column
    for a, b in zip(expected, with_gradients(lambda t: attend(impl)([*t, *weights]), sliced), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    leaves = [x.requires_grad_(), p.requires_grad_()]
    out = attend(impl)([*leaves, *weights])
    dense = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    expanded = torch.autograd.grad(out.sum(), leaves)  # a gradient of stride 0
    assert all(torch.equal(a, b) for a, b in zip(dense, expanded, strict=True))


def test_repeats_bitwise_and_leaves_its_inputs_alone(impl):
    inputs = case((2, 32, 9, 5, 16, 4), torch.float32)
    copies = [t.clone() for t in inputs]
    first, second = with_gradients(attend(impl), inputs), with_gradients(attend(impl), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_nan_spreads_over_its_sample_only(impl):
    x, p, weights = attention_case((2, 16, 4, 5), 8, 2)
    clean = call_attention(x, p, weights, impl=impl)
    x[1, 3, 2, 2] = float("nan")
    out = call_attention(x, p, weights, impl=impl)
    assert torch.equal(out[0], clean[0])
    assert out[1].isnan().all()


def test_layout_of_the_result_follows_x(impl):
    x, p, weights = attention_case((2, 16, 4, 5), 8, 2, channels_last=True)
    assert call_attention(x, p, weights, impl=impl).is_contiguous(memory_format=torch.channels_last)
    assert call_attention(x.contiguous(), p, weights, impl=impl).is_contiguous()


def test_frozen_inputs_get_no_gradient(impl):
    x, p, weights = attention_case((1, 16, 3, 3), 8, 2)
    weights = Weights(*(w.requires_grad_() for w in weights))
    call_attention(x, p, weights, impl=impl).sum().backward()
    assert x.grad is None
    assert all(w.grad is not None for w in weights)


BAD = {
    "p: batch 3 differs": lambda x, p, w: call_attention(x, p.repeat(3, 1, 1, 1)[:3], w),
    "p: size [4, 4] differs": lambda x, p, w: call_attention(x, p[..., :4], w),
    "x: expected 4 dimensions": lambda x, p, w: call_attention(x[0], p, w),
    "x: shape [2, 16, 0, 5] holds no element": lambda x, p, w: call_attention(x[:, :, :0], p[:, :, :0], w),
    "x: dtype torch.int32": lambda x, p, w: call_attention(x.int(), p, w),
    "p: dtype torch.complex64": lambda x, p, w: call_attention(x, p.cfloat(), w),
    "heads: 3 must be": lambda x, p, w: call_attention(x, p, w._replace(temperature=torch.ones(3))),
    "heads: 0 must be": lambda x, p, w: call_attention(x, p, w._replace(temperature=torch.ones(0))),
    "key_weight: expected shape [16, 8], got [16, 9]": lambda x, p, w: call_attention(
        x, p, w._replace(key=torch.ones(16, 9))
    ),
    "out_weight: expected shape [32, 16]": lambda x, p, w: call_attention(x, p, w._replace(out=w.query)),
    "scale: dtype torch.int64": lambda x, p, w: call_attention(x, p, w._replace(scale=torch.ones(16).long())),
    "p: lies on meta but x on cpu": lambda x, p, w: call_attention(x, p.to("meta"), w),
    "scale: lies on meta but x on cpu": lambda x, p, w: call_attention(x, p, w._replace(scale=w.scale.to("meta"))),
    "eps: 0.0 must be positive": lambda x, p, w: call_attention(x, p, w, eps=0.0),
    "impl: 'cuda' is unknown": lambda x, p, w: call_attention(x, p, w, impl="cuda"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    x, p, weights = attention_case((2, 16, 4, 5), 8, 2)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        BAD[message](x, p, weights)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter runs the kernels on CPU tensors")
def test_named_triton_never_falls_back():
    x, p, weights = attention_case((1, 16, 2, 2), 8, 2)
    with pytest.raises(ValueError, match="impl: 'triton' cannot run this call"):
        call_attention(x, p, weights, impl="triton")


@pytest.mark.skipif(not INTERPRETING, reason="limits of the kernels")
def test_named_triton_refuses_more_channels_than_it_takes():
    x, p, weights = attention_case((1, 516, 1, 2), 8, 2)
    with pytest.raises(ValueError, match="x has 516 channels"):
        call_attention(x, p, weights, impl="triton")


@pytest.mark.skipif(not INTERPRETING, reason="limits of the kernels")
def test_64_bit_offsets_give_the_same_numbers(impl, poisoned, monkeypatch):
    inputs = case((2, 48, 5, 7, 24, 3), torch.float64)
    narrow = with_gradients(attend(impl), inputs)
    import kernels.attention.triton_forward as passes

    asked = []
    monkeypatch.setattr(passes, "needs_int64", lambda *maps: asked.append(maps) or True)
    wide = with_gradients(attend(impl), inputs)
    assert asked
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))


@pytest.mark.skipif(not INTERPRETING, reason="the kernels' launches alone")
def test_launches_are_chosen_for_the_gpu_that_holds_the_maps(monkeypatch):
    """Launch configurations differ by architecture, so another GPU must not be current when one is chosen."""
    import kernels.attention.triton_backward as back
    import kernels.attention.triton_forward as front

    inside = []

    @contextlib.contextmanager
    def guard(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    def guarded(plain):
        def chosen(*arguments):
            assert inside, f"{arguments[0]} was chosen outside"
            return plain(*arguments)

        return chosen

    for module in (front, back):
        monkeypatch.setattr(module, "device_guard", guard)
        monkeypatch.setattr(module, "launch_config", guarded(module.launch_config))
        monkeypatch.setattr(module, "fused", guarded(module.fused))
    x, p, w = attention_case((1, 16, 3, 4), 16, 2)
    leaves = [t.requires_grad_() for t in (x, p, *w)]
    call_attention(leaves[0], leaves[1], Weights(*leaves[2:]), impl="triton").sum().backward()


def test_small_fp16_gradients_do_not_vanish(impl):
    inputs = case((1, 32, 24, 20, 16, 2), torch.float16)
    leaves = [t.detach().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    upstream = torch.full_like(inputs[0], 1e-4)
    attend(impl)(leaves).backward(upstream)
    composed(exact).backward(upstream.double())
    for name, a, b, bound in zip(("x", "p"), leaves, exact, (5e-4, 3e-3), strict=False):
        error = (a.grad.double() - b.grad).norm() / b.grad.norm()
        assert error < bound, f"gradient of {name}: relative error {error:.2e}"
