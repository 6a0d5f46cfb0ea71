"""What is handed to SLURM, told by a stand-in for sbatch; and photographs that change under an experiment."""

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image

from data.shards.set import ShardSet
from train.cli.experiments import _data_of
from train.experiments import runner
from train.experiments.plan import Trial
from train.experiments.runner import submit

SBATCH = """#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([sys.argv[1:], os.environ["RUN_ROOT"], os.environ["RUN_NAME"]]) + "\\n")
    print(100 + log.tell())
"""


def test_each_run_is_a_job_that_waits_for_the_prior_it_takes(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("{}\n")
    log, tool = tmp_path / "log", tmp_path / "sbatch"
    tool.write_text(SBATCH.format(python=sys.executable, log=str(log)))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    place = (f"run.root={tmp_path / 'runs'}",)
    trials = [
        Trial(name, 0, str(tmp_path / "base.yaml"), ("optim.lr=1e-4", *place, f"run.name={name}-seed0"), needs)
        for name, needs in (("taught", None), ("plugged", "taught-seed0"))
    ]
    jobs = submit(trials)
    (first, root, name), (second, _, _) = map(json.loads, log.read_text().splitlines())
    assert (root, name) == (str(tmp_path / "runs"), "taught-seed0")
    assert first == ["--parsable", "--job-name=taught-seed0", "slurm/train_multinode.sh", str(tmp_path / "base.yaml"),
                     "--set", "optim.lr=1e-4"]  # fmt: skip
    assert f"--dependency=afterok:{jobs['taught-seed0']}" in second
    assert not [word for word in first + second if word.startswith(("run.root", "run.name"))]


def test_a_run_that_was_scored_by_fewer_metrics_is_scored_again(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("{}\n")
    trial = Trial(
        "bare", 0, str(tmp_path / "base.yaml"), (f"run.root={tmp_path}", "run.name=bare-seed0"), also=("classes",)
    )
    file = tmp_path / "bare-seed0" / runner.RESULTS / "results.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    held, calls = {"metrics": {"psnr": {}}, "failed": []}, []
    monkeypatch.setattr(runner, "read_results", lambda _: held)
    monkeypatch.setattr(runner, "_trained", lambda *_: True)
    monkeypatch.setattr(runner.subprocess, "run", lambda command, **_: calls.append(command) or CompletedProcess([], 0))
    assert not runner.finished(trial)
    runner.make(trial, tell=lambda _: None)
    (command,) = calls
    assert "--overwrite" in command
    assert command[-2:] == ["--also", "classes"]
    held["metrics"]["classes"] = {}
    assert runner.finished(trial)
    runner.make(trial, tell=lambda _: None)
    assert len(calls) == 1


def photographs(folder: Path, seed: int) -> Path:
    for part, count in (("train", 3), ("val", 2)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            blocks = np.random.Generator(np.random.Philox([seed, n + 10 * (part == "val")])).integers(
                0, 256, (12, 12, 3)
            )
            Image.fromarray(np.kron(blocks, np.ones((16, 16, 1))).astype(np.uint8)).save(folder / part / f"{n}.png")
    return folder


def test_photographs_that_change_are_made_into_shards_anew_and_checked_anew(tmp_path):
    one, other = photographs(tmp_path / "a", 1), photographs(tmp_path / "b", 2)
    sets = [_data_of(each, tmp_path / "root") for each in (one, other, one)]
    assert sets[0] == sets[2] != sets[1]
    assert len({ShardSet(each["train"]).digest for each in sets}) == 2
    (one / "train" / "leaked.png").write_bytes((one / "val" / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"training picture .* shows what validation picture"):
        _data_of(one, tmp_path / "root")
