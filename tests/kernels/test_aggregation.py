"""Level aggregation against F.interpolate, softmax and sum: values, gradients, layouts, limits. Run in both lanes."""

import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.aggregation import ops
from kernels.aggregation.reference import composed_aggregation
from kernels.cases import aggregation_case, call_aggregation
from kernels.runtime import INTERPRETING
from tests.kernels.numerics import assert_close_as_eager, fenced_copy, with_gradients

# batch, target, sizes of the levels, D, G: equal, smaller, larger, mixed, one column, one pixel, five levels, several
# channel tiles, several pixel blocks, rows of several blocks. Small, for the interpreter takes
# milliseconds an operation.
SMALL = [
    (2, (4, 3), [(4, 3)], 8, 2),
    (1, (5, 4), [(3, 2), (1, 1)], 6, 1),
    (1, (3, 4), [(7, 5), (2, 3)], 6, 3),
    (1, (5, 1), [(3, 1), (1, 1), (8, 2)], 12, 1),
    (1, (3, 3), [(7, 2), (3, 5), (3, 3), (2, 2), (1, 1)], 4, 2),
    (1, (1, 1), [(3, 2), (1, 1)], 4, 2),
    (1, (2, 3), [(2, 2)], 40, 1),
    (1, (12, 6), [(5, 3)], 2, 1),
    (1, (2, 150), [(1, 70), (2, 150), (3, 301), (1, 9), (1, 1)], 2, 1),
]
LARGE = [
    (2, (9, 7), [(4, 3), (2, 2)], 12, 3),
    (2, (5, 6), [(11, 13), (5, 6), (3, 2)], 8, 8),
    (2, (6, 10), [(24, 5), (12, 20), (6, 10), (3, 5), (1, 1)], 20, 4),
    (3, (17, 23), [(9, 12), (5, 6), (3, 3), (2, 2)], 160, 1),
]
CASES = SMALL if INTERPRETING else SMALL + LARGE
RMS = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def split(levels):
    return levels[: len(levels) // 2], levels[len(levels) // 2 :]


def aggregate(impl, size):
    return lambda levels: call_aggregation(*split(levels), size, impl=impl)


def composed(size):
    return lambda levels: composed_aggregation(*split(levels), size)


def case(batch, sizes, channels, groups, dtype, **options):
    values, logits = aggregation_case(batch, channels, groups, sizes, dtype=dtype, **options)
    return values + logits


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("batch", "size", "sizes", "channels", "groups"), CASES, ids=str)
def test_equals_interpolate_softmax_sum_in_fp64(impl, batch, size, sizes, channels, groups, channels_last, poisoned):
    levels = case(batch, sizes, channels, groups, torch.float64, channels_last=channels_last)
    tested = with_gradients(aggregate(impl, size), levels)
    for a, b in zip(tested, with_gradients(composed(size), levels), strict=True):
        assert (a - b).abs().max() <= 1e-10


DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETING else [torch.bfloat16])  # the interpreter's bf16 is wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "size", "sizes", "channels", "groups"), [CASES[2], CASES[-1]], ids=str)
def test_error_stays_near_that_of_eager(impl, batch, size, sizes, channels, groups, dtype):
    levels = case(batch, sizes, channels, groups, dtype)
    exact = with_gradients(composed(size), [t.double() for t in levels])
    eager = with_gradients(composed(size), levels)
    assert_close_as_eager(with_gradients(aggregate(impl, size), levels), eager, exact, dtype, RMS[dtype])


def test_gradients_pass_gradcheck(impl):
    values, logits = aggregation_case(1, 2, 1, [(2, 1), (3, 3)], dtype=torch.float64)
    levels = [t.requires_grad_() for t in (*values, *logits)]
    assert torch.autograd.gradcheck(lambda *t: aggregate(impl, (2, 2))(list(t)), levels, fast_mode=INTERPRETING)


def test_extreme_logits_pick_one_level_without_overflow(impl):
    values, logits = aggregation_case(1, 4, 2, [(3, 3), (6, 6)])
    logits[0].fill_(-3e4)
    logits[1].fill_(3e4)
    out = call_aggregation(values, logits, (6, 6), impl=impl)
    assert torch.equal(out, values[1])


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_level_of_the_targets_size_passes_through_bit_for_bit(impl, channels_last):
    levels = case(1, [(33, 31)], 4, 1, torch.float32, channels_last=channels_last)
    leaves = [t.requires_grad_() for t in levels]
    out = aggregate(impl, (33, 31))(leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    d_value, d_logit = torch.autograd.grad(out, leaves, upstream)
    assert torch.equal(out, levels[0])
    assert torch.equal(d_value, upstream)
    assert d_logit.abs().max() <= 1e-6


@pytest.mark.skipif(not INTERPRETING, reason="the bits of the kernel: interpreter lane")
@pytest.mark.parametrize("channels_last", [False, True])
def test_levels_of_the_targets_size_give_the_bits_of_the_softmax_weighted_sum(channels_last):
    levels = case(1, [(33, 31)] * 3, 2, 1, torch.float32, channels_last=channels_last)
    out = aggregate("triton", (33, 31))(levels)
    values, logits = split([t.numpy() for t in levels])
    top = np.maximum(np.maximum(logits[0], logits[1]), logits[2])
    powers = [np.exp(a - top) for a in logits]  # torch's exp differs by an ulp
    inverse = np.float32(1) / (powers[0] + powers[1] + powers[2])
    shares = [power * inverse for power in powers]
    expected = shares[0] * values[0] + shares[1] * values[1] + shares[2] * values[2]
    assert torch.equal(out, torch.from_numpy(expected))


@pytest.mark.parametrize("channels_last", [False, True])
def test_reads_and_writes_no_element_outside_its_tensors(impl, channels_last, fences):
    levels = case(1, [(3, 2), (3, 5), (2, 3)], 6, 2, torch.float32, channels_last=channels_last)
    guarded = [fenced_copy(t) for t in levels]
    run = aggregate(impl, (2, 3))
    for a, b in zip(with_gradients(run, levels), with_gradients(run, guarded), strict=True):
        assert torch.equal(a, b)
    fences()


def test_strided_levels_and_expanded_gradients_give_the_same_result(impl):
    values, logits = aggregation_case(1, 4, 1, [(3, 2), (2, 1)])
    wide, columns = torch.zeros(1, 9, 3, 2), torch.zeros(1, 4, 2, 2)
    wide[:, 3:7], columns[..., ::2] = values[0], values[1]
    strided = [wide[:, 3:7], columns[..., ::2], *logits]  # a slice of channels; every other column
    run = aggregate(impl, (3, 3))
    for a, b in zip(with_gradients(run, [*values, *logits]), with_gradients(run, strided), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    leaves = [t.requires_grad_() for t in (*values, *logits)]
    out = run(leaves)
    dense = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    expanded = torch.autograd.grad(out.sum(), leaves)  # a gradient of stride 0
    assert all(torch.equal(a, b) for a, b in zip(dense, expanded, strict=True))


def test_repeats_bitwise_and_leaves_its_inputs_alone(impl):
    levels = case(2, [(4, 3), (2, 2)], 4, 1, torch.float32)
    copies = [t.clone() for t in levels]
    first, second = (with_gradients(aggregate(impl, (3, 4)), levels) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(levels, copies, strict=True))


def test_nan_spreads_over_its_group_and_neighbourhood_only(impl):
    values, logits = aggregation_case(2, 8, 2, [(2, 3), (2, 2)])
    clean = call_aggregation(values, logits, (4, 5), impl=impl)
    logits[0][1, 0, 0, 0] = float("nan")
    out = call_aggregation(values, logits, (4, 5), impl=impl)
    assert out[1, :4, 0, 0].isnan().all()
    assert torch.equal(out[0], clean[0])
    assert torch.equal(out[1, 4:], clean[1, 4:])


def test_levels_of_other_dtypes_are_cast_to_the_first(impl):
    values, logits = aggregation_case(1, 4, 2, [(2, 2), (4, 4)])
    mixed = [values[0], values[1].half()], [logits[0].half(), logits[1]]
    same = [v.to(torch.float32) for v in mixed[0]], [a.to(torch.float32) for a in mixed[1]]
    out = call_aggregation(*mixed, (4, 4), impl=impl)
    assert out.dtype == torch.float32
    assert torch.equal(out, call_aggregation(*same, (4, 4), impl=impl))


class Launches(TorchDispatchMode):
    """Counts what a GPU would launch among torch's operators: all but allocations, views and our own operators."""

    FREE = ("empty", "detach", "view", "alias", "as_strided", "expand", "new_empty", "ones_like", "sharpprior")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(word in str(func) for word in self.FREE):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not INTERPRETING, reason="counts the kernels' launches: interpreter lane")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_forward_and_backward_are_three_launches_for_any_number_of_levels(count, channels_last, monkeypatch):
    from kernels.aggregation import triton as passes

    launched = []

    def counted(name):
        class Proxy:
            def __getitem__(self, grid):
                launched.append(name)
                return lambda *args, **constants: None  # the interpreter's own copies are no launches

        return Proxy()

    for name in [name for name in vars(passes) if name.endswith("_kernel")]:
        monkeypatch.setattr(passes, name, counted(name))
    sizes = [(2, 3), (1, 1), (3, 4), (4, 7), (2, 2)][:count]
    values, logits = aggregation_case(1, 4, 2, sizes, channels_last=channels_last)
    leaves = [t.requires_grad_() for t in (*values, *logits)]
    with Launches() as around:
        out = call_aggregation(leaves[:count], leaves[count:], (2, 3), impl="triton")
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert launched == ["aggregate_kernel", "share_kernel", "level_gradient_kernel"]
    assert around.names == []
    # The operators' bodies are hidden from the mode above: run them openly.
    with torch.no_grad(), Launches() as within:
        out, lse = ops.forward(values, logits, 2, 3, True)
        ops.backward(torch.ones_like(out).expand_as(out), values, logits, lse, True)
    assert len(launched) == 6
    assert within.names == []


BAD = {
    "values: holds no level": lambda v, a: call_aggregation([], [], (4, 4)),
    "logits: 1 levels for the 2": lambda v, a: call_aggregation(v, a[:1], (4, 4)),
    "values[1]: batch 1 differs": lambda v, a: call_aggregation([v[0], v[1][:1]], a, (4, 4)),
    "values[1]: 6 channels differ": lambda v, a: call_aggregation([v[0], v[1][:, :6]], a, (4, 4)),
    "logits: 3 groups do not divide": lambda v, a: call_aggregation(
        v, [torch.cat([t, t[:, :1]], 1) for t in a], (4, 4)
    ),
    "logits[1]: 1 groups differ": lambda v, a: call_aggregation(v, [a[0], a[1][:, :1]], (4, 4)),
    "logits[0]: size [2, 3] differs": lambda v, a: call_aggregation(v, [a[1], a[1]], (4, 4)),
    "values[0]: shape [2, 8, 0, 6] holds no element": lambda v, a: call_aggregation([v[0][:, :, :0], v[1]], a, (4, 4)),
    "values[0]: dtype torch.int64": lambda v, a: call_aggregation([v[0].long(), v[1]], a, (4, 4)),
    "logits[0]: lies on meta": lambda v, a: call_aggregation(v, [a[0].to("meta"), a[1]], (4, 4)),
    "size: expected (height, width)": lambda v, a: call_aggregation(v, a, (0, 4)),
    "impl: 'fast' is unknown": lambda v, a: call_aggregation(v, a, (4, 4), impl="fast"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    values, logits = aggregation_case(2, 8, 2, [(4, 6), (2, 3)])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        BAD[message](values, logits)
    assert "\n" not in str(error.value)
