"""A window of steps under torch's profiler."""

import gzip
import json

import torch

from train.config.schema import ProfileSection
from train.run.profile import AFTER, StepProfile

CPU = torch.device("cpu")


def steps(profile: StepProfile, first: int, last: int) -> None:
    for done in range(first, last + 1):
        torch.rand(8, 8) @ torch.rand(8, 8)
        profile.between(done)


def calls(path) -> int:
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return sum(event.get("name") == "aten::mm" for event in events)


def test_the_window_s_steps_and_no_others_are_in_the_trace_and_the_table(tmp_path):
    profile = StepProfile(tmp_path, ProfileSection(step=3, steps=2), 0, CPU)
    steps(profile, 1, 6)
    assert calls(tmp_path / "profile" / "step-3.json.gz") == 2
    assert "aten::mm" in (tmp_path / "profile" / "step-3.txt").read_text()


def test_without_a_step_the_window_begins_when_all_is_warm_and_a_run_that_ends_in_it_writes_what_there_is(tmp_path):
    profile = StepProfile(tmp_path, ProfileSection(steps=9), 100, CPU)
    steps(profile, 101, 100 + AFTER + 4)
    profile.close()
    assert calls(tmp_path / "profile" / f"step-{100 + AFTER + 1}.json.gz") == 4
    profile.close()


def test_a_window_before_the_run_s_place_is_told(tmp_path, caplog):
    profile = StepProfile(tmp_path, ProfileSection(step=5), 7, CPU)
    steps(profile, 8, 9)
    assert caplog.messages == ["profile.step 5 lies before step 8, where this run goes on: no profile"]
    assert not (tmp_path / "profile").exists()
