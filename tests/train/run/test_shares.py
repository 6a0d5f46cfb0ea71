"""Shares of a step: by the clock on a CPU, by events on a GPU (stand-ins here), and where passes are replayed."""

import itertools

import pytest
import torch
from torch import nn

from tests.train.engine.test_network import image, network
from tests.train.rerun import RerunRecorder
from train.engine.graphs import Graphs
from train.run import shares as subject
from train.run.shares import StepShares, mean_shares


def step(shares: StepShares, module: nn.Module) -> dict[str, float]:
    with shares.timed("step"):
        with shares.timed("data"):
            pass
        with shares.timed("forward"):
            out = module(image())
        with shares.timed("backward"):
            sum(level.sum() for level in (*out.prior, *out.restored)).backward()
        with shares.timed("update"):
            pass
    return shares.take(1e6, 0.0)


def test_replayed_passes_count_whole_and_their_parts_are_told_from_eager_steps():
    module = network().train()
    graphs = Graphs(module, RerunRecorder(), eager_calls=3)
    shares = StepShares(module, recording=lambda: graphs.recording)
    eager = [step(shares, module) for _ in range(2)]
    assert shares.new_parts() is None
    eager.append(step(shares, module))
    stage, parts = shares.new_parts()
    assert stage == "deblur"
    assert set(parts) == {"student", "fusion", "spe", "backbone"}
    assert sum(parts.values()) == pytest.approx(1)
    assert all("forward" not in each and each["student"] > 0 for each in eager)
    replayed = [step(shares, module) for _ in range(2)]
    assert graphs.replays == 2
    assert shares.new_parts() is None
    for each in replayed:
        assert each["forward"] > 0
        assert each["student"] == each["backbone"] == 0
        assert sum(each.values()) == pytest.approx(1)
    records = [{"pixel": 1.0, "shares": each} for each in eager + replayed]
    assert mean_shares(records)["forward"] == pytest.approx(sum(each["forward"] for each in replayed) / 2)


class Event:
    """A CUDA event of a GPU that has done everything up to `done`; one millisecond passes between two of them."""

    made = itertools.count()
    done = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.number = next(self.made)

    def query(self) -> bool:
        return self.number <= Event.done

    def elapsed_time(self, other: "Event") -> float:
        assert self.query()
        assert other.query(), "reading an event that the GPU has not passed is an error"
        return float(other.number - self.number)

    def synchronize(self) -> None:
        raise AssertionError("nothing waits for the GPU")


def test_on_a_gpu_shares_are_those_of_the_newest_step_that_it_has_finished(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", Event.synchronize)
    module = network().train()
    shares = StepShares(module)
    shares._gpu = True
    assert step(shares, module) == {}
    last = next(Event.made)
    assert step(shares, module) == {}
    Event.done = last
    third = step(shares, module)
    assert sum(third.values()) == pytest.approx(1)
    assert third["rest"] < 0.5  # of the GPU's own time, not of the million seconds of the clock
    assert len(shares._steps) == 2
    Event.done = next(Event.made)
    step(shares, module)
    assert len(shares._steps) == 1
    assert subject.TELLING_STEPS == 3
    assert shares.new_parts() is not None
