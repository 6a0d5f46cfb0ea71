"""Level aggregation against F.interpolate, softmax and sum: values, gradients, layouts, limits. Run in both lanes."""

import re

import pytest
import torch
from numerics import assert_close_as_eager, fenced_copy, with_gradients

from kernels.aggregation.reference import composed_aggregation
from kernels.cases import aggregation_case, call_aggregation
from kernels.runtime import INTERPRETING

# target, sizes of the levels, D, G: smaller, larger, equal, mixed, one pixel, one column, five levels.
CASES = [
    ((9, 7), [(9, 7)], 16, 4),
    ((9, 7), [(4, 3), (2, 2)], 12, 3),
    ((5, 6), [(11, 13), (5, 6), (3, 2)], 8, 8),
    ((8, 1), [(4, 1), (2, 1), (1, 1), (16, 2)], 24, 1),
    ((6, 10), [(24, 5), (12, 20), (6, 10), (3, 5), (1, 1)], 20, 4),
    ((1, 1), [(7, 5), (1, 1)], 6, 2),
    ((7, 9), [(3, 4)], 160, 1),
]
RMS = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def split(levels):
    return levels[: len(levels) // 2], levels[len(levels) // 2 :]


def aggregate(impl, size):
    return lambda levels: call_aggregation(*split(levels), size, impl=impl)


def composed(size):
    return lambda levels: composed_aggregation(*split(levels), size)


def case(sizes, channels, groups, dtype, **options):
    values, logits = aggregation_case(2, channels, groups, sizes, dtype=dtype, **options)
    return values + logits


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("size", "sizes", "channels", "groups"), CASES, ids=str)
def test_equals_interpolate_softmax_sum_in_fp64(impl, size, sizes, channels, groups, channels_last, poisoned):
    levels = case(sizes, channels, groups, torch.float64, channels_last=channels_last)
    tested = with_gradients(aggregate(impl, size), levels)
    for a, b in zip(tested, with_gradients(composed(size), levels), strict=True):
        assert (a - b).abs().max() <= 1e-10


DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETING else [torch.bfloat16])  # the interpreter's bf16 is wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "sizes", "channels", "groups"), [CASES[2], CASES[4]], ids=str)
def test_error_stays_near_that_of_eager(impl, size, sizes, channels, groups, dtype):
    levels = case(sizes, channels, groups, dtype)
    exact = with_gradients(composed(size), [t.double() for t in levels])
    eager = with_gradients(composed(size), levels)
    assert_close_as_eager(with_gradients(aggregate(impl, size), levels), eager, exact, dtype, RMS[dtype])


def test_gradients_pass_gradcheck(impl):
    values, logits = aggregation_case(1, 4, 2, [(2, 2), (4, 3), (1, 1)], dtype=torch.float64)
    levels = [t.requires_grad_() for t in (*values, *logits)]
    assert torch.autograd.gradcheck(lambda *t: aggregate(impl, (3, 2))(list(t)), levels, atol=1e-6, nondet_tol=0.0)


def test_extreme_logits_pick_one_level_without_overflow(impl):
    values, logits = aggregation_case(1, 4, 2, [(3, 3), (6, 6)])
    logits[0].fill_(-3e4)
    logits[1].fill_(3e4)
    out = call_aggregation(values, logits, (6, 6), impl=impl)
    torch.testing.assert_close(out, values[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_reads_and_writes_no_element_outside_its_tensors(impl, channels_last, fences):
    levels = case([(5, 3), (11, 9)], 12, 3, torch.float32, channels_last=channels_last)
    guarded = [fenced_copy(t) for t in levels]
    run = aggregate(impl, (7, 6))
    for a, b in zip(with_gradients(run, levels), with_gradients(run, guarded), strict=True):
        assert torch.equal(a, b)
    fences()


def test_strided_levels_and_expanded_gradients_give_the_same_result(impl):
    values, logits = aggregation_case(2, 8, 2, [(4, 6), (2, 3)])
    expected = with_gradients(aggregate(impl, (5, 5)), [*values, *logits])
    wide = torch.zeros(2, 20, 4, 6)
    wide[:, 3:11] = values[0]
    columns = torch.zeros(2, 8, 2, 6)
    columns[..., ::2] = values[1]
    strided = [wide[:, 3:11], columns[..., ::2], *logits]
    for a, b in zip(expected, with_gradients(aggregate(impl, (5, 5)), strided), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    leaves = [t.requires_grad_() for t in (*values, *logits)]
    out = aggregate(impl, (5, 5))(leaves)
    dense = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    expanded = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(dense, expanded, strict=True))


def test_repeats_bitwise_and_leaves_its_inputs_alone(impl):
    levels = case([(4, 3), (9, 8), (2, 2)], 12, 3, torch.float32)
    copies = [t.clone() for t in levels]
    first, second = (with_gradients(aggregate(impl, (6, 7)), levels) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(levels, copies, strict=True))


def test_nan_spreads_over_its_group_and_neighbourhood_only(impl):
    values, logits = aggregation_case(2, 8, 2, [(4, 4), (2, 2)])
    clean = call_aggregation(values, logits, (8, 8), impl=impl)
    logits[0][1, 0, 0, 0] = float("nan")
    out = call_aggregation(values, logits, (8, 8), impl=impl)
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
