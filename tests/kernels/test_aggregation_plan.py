"""Host side of the aggregation kernels: windows and reaches hold every pixel that is needed, divisions are exact."""

import ast
import inspect

import pytest
import torch

from kernels.aggregation import plan
from kernels.cases import aggregation_case
from kernels.runtime import TRITON_INSTALLED

WIDTHS = (1, 2, 3, 7, 16, 31, 32, 33, 63, 64, 65, 100, 128, 129, 160, 257, 320, 511, 640)


def neighbours(w: int, W: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lower and upper source of every target and the upper's weight, in float32 as the kernels compute them."""
    position = ((torch.arange(W) + 0.5) * torch.tensor(w / W) - 0.5).clamp_min(0)
    low = position.int().clamp_max(w - 1)
    return low, (low + 1).clamp_max(w - 1), position - low


@pytest.mark.parametrize("W", WIDTHS)
def test_a_window_holds_every_source_of_its_targets(W):
    block_n = max(16, min(64, plan.power_of_2(W)))
    read = 0
    for w in WIDTHS:
        pixels = plan.window(torch.empty(1, 16, 3, w), 5, W, 16, block_n)
        if pixels == plan.TAPS:
            assert w > 3 * W, "only a level much wider than the target is read by taps"
            continue
        low, high, _ = neighbours(w, W)
        for first in range(0, W, block_n):
            start = low[first] // plan.ALIGN * plan.ALIGN
            assert high[first : first + block_n].max() - start < pixels
            read += 1
    assert read


@pytest.mark.parametrize("W", WIDTHS)
def test_a_source_reaches_every_target_that_sampled_it(W):
    for w in WIDTHS:
        low, high, upper = neighbours(w, W)
        o = torch.arange(w)
        first = torch.floor((o - 0.5) * torch.tensor(W / w) - 0.5).clamp_min(0) * (o > 0)
        for source, weight in ((low, 1 - upper), (high, upper)):
            targets = torch.arange(W)[weight > 0]
            begun = first[source[weight > 0].long()]
            assert (targets >= begun).all()
            assert (targets < begun + plan.reach(W, w)).all()


@pytest.mark.parametrize("W", WIDTHS)
@pytest.mark.parametrize("block_t", [64, 128])
def test_parts_cover_a_row_and_find_their_targets_in_one_block_where_they_can(W, block_t):
    for w in WIDTHS:
        length = plan.part(w, W, block_t)
        assert 1 <= length <= min(w, 128)
        assert -(-w // length) * length - w < length
        if length == 1 or block_t >= W:
            continue  # one source of a very coarse level takes several blocks
        low, high, upper = neighbours(w, W)
        for begin in range(0, w, length):
            mine = ((low >= begin) & (low < begin + length)) | ((high >= begin) & (high < begin + length) & (upper > 0))
            targets = torch.arange(W)[mine]
            if len(targets):
                assert targets.max() - targets.min() + plan.ALIGN < block_t


def test_coarse_levels_run_first_and_every_program_has_a_level():
    values, logits = aggregation_case(2, 8, 2, [(12, 20), (3, 5), (6, 10), (6, 10), (24, 40)])
    made = plan.plan_gradient(values, logits, torch.empty(2, 8, 12, 20))
    firsts, stops = made.levels[11:13]
    assert [*sorted(firsts)[1:], made.grid[0]] == sorted(stops)
    assert [firsts.index(n) for n in sorted(firsts)] == [1, 2, 3, 0, 4]


def test_extent_counts_rows_and_columns_of_one_sample():
    def meta(*strides):
        return torch.empty_strided((1, 4, 8, 8), strides, device="meta")

    assert not plan.needs_int64([meta(0, 64, 8, 1), meta(2**40, 64, 8, 1)])
    assert plan.needs_int64([meta(0, 64, 8, 1), meta(0, 2**30, 8, 1)])
    assert plan.needs_int64([meta(0, 64, 2**29, 1)])
    assert plan.needs_int64([meta(0, 1, 4, 2**29)])


@pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed")
def test_jitted_code_divides_exactly():
    """Triton's `/` is approximate in float32 on a GPU (not here): a scale of 1 became 1 ± 1 ulp there."""
    from kernels.aggregation import sampling
    from kernels.aggregation import triton as passes

    seen = 0
    for module in (sampling, passes):
        for function in ast.walk(ast.parse(inspect.getsource(module))):
            jitted = isinstance(function, ast.FunctionDef) and [ast.unparse(d) for d in function.decorator_list]
            if not jitted or "triton.jit" not in jitted:
                continue
            seen += 1
            for node in ast.walk(function):
                assert not isinstance(getattr(node, "op", None), ast.Div), f"{function.name}: line {node.lineno}"
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.fdiv":
                    assert "ieee_rounding=True" in ast.unparse(node)
    assert seen > 8
