"""Where passes are not captured: shapes, failures, hooks and settings that forbid it, with one line each."""

import itertools
import logging

import pytest
import torch

from tests.train.engine.graph_cases import assert_same, graphed, image, learn, small
from tests.train.rerun import RerunRecorder
from train.config.schema import Config, EngineSection
from train.engine.capture import RECORDERS
from train.engine.engine import Engine
from train.engine.graphs import MOST_SIGNATURES, Graphs


def test_more_shapes_than_are_captured_run_eagerly_with_one_line(caplog):
    module = small()
    found = graphed(module, eager_calls=0)
    for side in range(20, 20 + MOST_SIGNATURES + 3):
        assert torch.equal(module(image(1, side)).maps[0], small()(image(1, side)).maps[0])
    assert found.recorder.captured == 2 * MOST_SIGNATURES
    assert [record.message for record in caplog.records] == [
        f"network: no CUDA graphs: more than {MOST_SIGNATURES} shapes of calls: the others run eagerly"
    ]


class BrokenRecorder(RerunRecorder):
    """Fails in the backward capture, as a driver might."""

    def capture(self, function):
        if self.captured:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return super().capture(function)


def test_a_capture_that_fails_is_told_once_and_the_run_goes_on_with_the_same_bits(caplog):
    module = small()
    Graphs(module, BrokenRecorder())
    assert_same(learn(module, 7), learn(small(), 7))
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "network: no CUDA graphs: RuntimeError: operation not permitted when stream is capturing"
    ]


def test_a_capture_that_fails_on_another_rank_keeps_this_one_eager(caplog):
    module = small()
    found = Graphs(module, RerunRecorder(), agree=lambda reason: "OutOfMemoryError: rank 3", eager_calls=0)
    module(image(1))
    module(image(1))
    assert found.replays == 0
    assert caplog.messages == ["network: no CUDA graphs: OutOfMemoryError: rank 3"]


def test_strict_refuses_instead_of_falling_back():
    module = small()
    Graphs(module, BrokenRecorder(), strict=True, eager_calls=0)
    with pytest.raises(ValueError, match=r"engine\.graphs on: network: RuntimeError: operation not permitted"):
        module(image(1))


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "gradient"])
def test_hooks_that_replays_would_not_call_forbid_graphs(kind, caplog):
    module = small()
    found = graphed(module, eager_calls=0)
    add = {
        "forward": lambda: module.first.register_forward_hook(lambda *_: None),
        "pre": lambda: module.first.register_forward_pre_hook(lambda *_: None),
        "backward": lambda: module.first.register_full_backward_hook(lambda *_: None),
        "gradient": lambda: module.first.weight.register_hook(lambda gradient: gradient),
    }
    add[kind]()
    module(image(1))
    assert found.recorder.captured == 0
    assert "first" in caplog.messages[0]
    assert "has a hook" in caplog.messages[0]


def test_hooks_of_the_module_itself_and_those_that_may_rest_do_not():
    module = small()
    found = graphed(module, eager_calls=0)

    def timed(*_):
        return None

    timed.may_rest = True
    module.first.register_forward_hook(timed)
    doubled = []
    module.register_forward_pre_hook(lambda _, inputs: doubled.append(1) or inputs)
    module(image(1))
    module(image(2))
    assert found.replays == 2
    assert len(doubled) == 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"zero": 3}, "under zero 3 parameters are gathered and let go in every pass"),
        ({"compile": True}, "compile has launches of its own: choose one of the two"),
    ],
)
def test_settings_under_which_no_trained_network_is_captured(settings, reason, monkeypatch, caplog):
    """`auto`: a line, on one rank, and only where graphs were possible; `on`: refused before anything starts."""
    with pytest.raises(ValueError, match=f"graphs on: {reason}; set it to auto"):
        EngineSection(graphs="on", **settings)
    monkeypatch.setitem(RECORDERS, "cuda", lambda device: RerunRecorder())
    for graphs, kind, rank in itertools.product(("auto", "off"), ("cuda", "cpu"), (0, 1)):
        caplog.clear()
        engine = object.__new__(Engine)
        engine.config = Config(engine={**settings, "graphs": graphs})
        engine.device, engine.rank, engine._replayed = torch.device(kind), rank, []
        assert engine.replayed(small(), "network") is None
        told = (graphs, kind, rank) == ("auto", "cuda", 0)
        assert caplog.messages == ([f"network: no CUDA graphs: {reason}"] if told else [])
        # A frozen teacher is no parameter of ZeRO's, nor compiled here.
        teacher = engine.replayed(small(), "teacher", trained=False)
        assert (teacher is not None) == ((graphs, kind) == ("auto", "cuda"))
