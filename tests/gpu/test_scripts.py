"""The scripts for a GPU, as far as a CPU can tell: they call today's kernels, and their runs are possible."""

import json
import os
import subprocess
import sys

import pytest

from kernels.runtime import INTERPRETING, TRITON_INSTALLED
from tests.gpu import one_check
from tests.gpu.rows import ROOT, Rows
from tests.gpu.two_sweep import DRY_SHAPES, PASSES, STEPS, settings
from train.config.file import load_config

pytestmark = pytest.mark.skipif(INTERPRETING, reason="already inside the interpreter lane")


@pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed")
def test_the_sweep_calls_every_pass(tmp_path):
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shapes = "+".join(",".join(map(str, shape)) for shape in DRY_SHAPES)
    command = [sys.executable, "-m", "tests.gpu.two_sweep", "+".join(PASSES), shapes, "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "two_sweep.jsonl").read_text().splitlines()]
    assert {row["kernel"] for row in rows if row["us"] == "called once"} == set(PASSES)


@pytest.mark.parametrize(("backbone", "batch", "graphs", "ways"), STEPS)
def test_the_steps_are_of_runs_that_are_possible(backbone, batch, graphs, ways):
    for way in ways:
        overrides = [f"{key}={value}" for key, value in settings(backbone, batch, graphs, way).items()]
        config = load_config(ROOT / "configs" / "large.yaml", overrides)
        assert (config.model.prior, config.student_rests) == (way != "bare", way == "frozen")
        assert not config.kernels.check
        assert config.engine.graphs == graphs


def test_cases_past_the_deadline_are_not_called_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["one_check", "--dry", "--out", str(tmp_path)])
    rows = Rows("one_check", "doc")
    one_check.cases(rows, seconds=1.0)
    monkeypatch.setattr(one_check, "process", lambda *_, **__: (124, "the time was up"))
    one_check.cases(rows, seconds=100.0)
    found = [json.loads(line) for line in (tmp_path / "one_check.jsonl").read_text().splitlines()]
    assert {row["right"] for row in found} == {None}
    assert [row["why"] for row in found] == ["not run"] * 2 + ["not finished"] * 2


def test_a_training_that_fails_says_why(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\n[ $1 != -c ] || exit 0\necho 'error: no such key' >&2\nexit 2\n")
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"OUT": str(tmp_path), "PYTHON": str(tmp_path / "python")}
    command = ["bash", "tests/gpu/three_train.sh", "60"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "error: no such key" in done.stdout
    assert '"status": 2' in done.stdout
