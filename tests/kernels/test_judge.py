"""What is right and wrong of a kernel, in one process: run inside the interpreter (test_lanes.py starts it)."""

import pytest
import torch

from kernels import routes
from kernels.judge import judge
from kernels.routes import AggregationCase, AttentionCase
from kernels.runtime import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="breaks kernels, which run in the interpreter lane")
ATTENTION = AttentionCase(2, 16, 3, 4, 8, 2, "float32")
AGGREGATION = AggregationCase(1, 4, 3, 2, 2, ((2, 2), (1, 1)), "float32")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "case",
    [
        ATTENTION,
        AttentionCase(1, 24, 5, 3, 12, 3, "float16", "channels_last"),
        AggregationCase(1, 4, 3, 2, 2, ((2, 2), (1, 1)), "float16", "channels_last"),
    ],
    ids=str,
)
def test_kernels_as_they_are_pass(case):
    found = judge(case, "triton", CPU)
    assert (found["right"], found["why"], found["repeats"]) == (True, None, True)
    assert 0 < found["error"] <= 1
    assert "ms" not in found


@pytest.mark.parametrize("route", ["triton-tiled", "composed"])
def test_the_other_routes_pass(route):
    assert judge(ATTENTION, route, CPU)["right"]
    nothing = routes.chosen(ATTENTION.group, torch.empty(1, 16, 2, 2))[0]
    assert nothing is None, "judging leaves no choice behind"


def test_the_tiled_route_runs_other_kernels(monkeypatch):
    import kernels.attention.triton_backward as passes

    monkeypatch.setattr(passes, "_fused_gradients", None)
    assert judge(ATTENTION, "triton-tiled", CPU)["right"]
    assert not judge(ATTENTION, "triton", CPU)["right"]


@pytest.mark.parametrize(
    ("fault", "case", "told"),
    [
        ("wrong_sign", ATTENTION, "wrong dp: relative RMS error 2 (bound "),
        ("race", ATTENTION, "not repeatable"),
        ("out_of_bounds", ATTENTION, "writes outside its results"),
        ("unwritten", AGGREGATION, "P is not finite; not repeatable"),
        ("raises", ATTENTION, "cannot run: IndexError: list index out of range"),
    ],
)
def test_a_fault_is_found_and_named(monkeypatch, fault, case, told):
    from tests.kernels.broken import break_kernels

    break_kernels([fault], monkeypatch.setattr)
    found = judge(case, "triton", CPU)
    assert found["right"] is False
    assert found["why"].startswith(told)
    assert "; " not in found["why"].removeprefix(told), "nothing else was found"
    assert judge(case, "composed", CPU)["right"], "the composed form has none of these kernels"


def test_a_kernel_that_writes_into_its_inputs_is_found(monkeypatch):
    import kernels.attention.triton as attention

    plain = attention.gram_pass
    monkeypatch.setattr(attention, "gram_pass", lambda x, p, eps: (plain(x, p, eps), x[:, 0].add_(1.0))[0])
    assert "writes into its inputs" in judge(ATTENTION, "triton", CPU)["why"]


def test_running_out_of_memory_says_nothing_of_the_next_try(monkeypatch):
    import kernels.attention.triton as attention

    def full(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(attention, "gram_pass", full)
    assert judge(ATTENTION, "triton", CPU) == {"right": False, "why": "out of memory", "passing": True}


def test_a_compiler_that_fails_is_asked_again_next_time(monkeypatch):
    from kernels import compiled

    def failing(*_):
        raise ImportError("file too short")

    monkeypatch.setattr(compiled, "run", failing)
    found = judge(ATTENTION, "compiled", CPU)
    assert (found["why"], found["passing"]) == ("cannot run: ImportError: file too short", True)


def test_an_illegal_access_ends_the_process_use(monkeypatch):
    import kernels.attention.triton as attention

    def illegal(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors …")

    monkeypatch.setattr(attention, "gram_pass", illegal)
    found = judge(ATTENTION, "triton", CPU)
    assert found == {"right": False, "why": "illegal memory access", "fatal": True}


# A head of one channel attends to itself, so query, key and temperature get no gradient at all; on one pixel their
# gradients are 0 but for rounding, and norms of rows by Gram matrices cancel.
NARROW, PIXEL = AttentionCase(1, 16, 4, 4, 16, 16, "float32"), AttentionCase(2, 16, 1, 1, 16, 2, "float32")


@pytest.mark.parametrize("case", [NARROW, PIXEL], ids=["head of one channel", "one pixel"])
def test_gradients_of_nothing_are_right_and_hide_nothing(monkeypatch, case):
    import kernels.attention.triton as attention

    assert judge(case, "triton", CPU)["why"] is None
    plain = attention.backward

    def wrong(*arguments):
        gradients = plain(*arguments)
        return gradients._replace(value=-gradients.value)

    monkeypatch.setattr(attention, "backward", wrong)
    found = judge(case, "triton", CPU)
    assert found["why"].startswith("wrong d_value: relative RMS error 2 (bound "), found
    assert float(found["why"].partition("(bound ")[2].partition(")")[0]) < 1e-3


def test_an_error_within_the_bound_of_the_dtype_is_right_and_one_beyond_is_not(monkeypatch):
    """One pixel is off by a few epsilons of y's largest value: right below the bound, wrong above."""
    import kernels.attention.triton as attention

    plain = attention.apply_pass
    eps = torch.finfo(torch.float32).eps
    for epsilons, right in ((1, True), (8, False)):

        def off(*arguments, by=epsilons * eps):
            plain(*arguments)
            arguments[-1][0, 0, 0] += by * arguments[-1].abs().max()

        monkeypatch.setattr(attention, "apply_pass", off)
        found = judge(ATTENTION, "triton", CPU)
        assert found["right"] is right, found
