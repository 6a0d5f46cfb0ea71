"""A run goes on with other ranks, under another ZeRO stage: the same state, bit for bit, the same losses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.weights import assert_same_weights
from train.checkpoint.manifest import CheckpointError, read_state
from train.checkpoint.resume import check_fits, divided_anew
from train.checkpoint.state import StateFiles
from train.config.file import load_config

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parents[1] / "workers" / "states.py"
CHAIN = ((1, 0, 3), (2, 1, 5), (4, 2, 7), (2, 4, 9))  # ranks, ranks before, steps reached


@pytest.fixture(scope="session")
def chain(runs, tmp_path_factory) -> list[tuple[Path, dict]]:
    """A small network on 1, 2, 4 and again 2 ranks, each time under all four stages."""
    root = tmp_path_factory.mktemp("states")
    results = []
    for number, (ranks, before, last) in enumerate(CHAIN):
        folder = root / str(number)
        folder.mkdir()
        for made in (root / str(number - 1)).glob(f"w{before}*") if before else ():
            (folder / made.name).symlink_to(made)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command += [str(WORKER), str(folder), str(before), str(last)]
        done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append((folder, json.loads((folder / f"w{ranks}.json").read_text())["stages"]))
    return results


def test_every_stage_takes_up_what_another_number_of_ranks_wrote_under_another_stage_bit_for_bit(chain):
    for _, stages in chain:
        for stage, result in stages.items():
            assert result["taken_up"], f"ZeRO {stage}: weights, moments, averages or counts differ from the files"
            assert result["written"], f"ZeRO {stage}: the files differ from what DeepSpeed gathers"


def test_adam_counts_on(chain):
    for (_, stages), (*_, last) in zip(chain, CHAIN, strict=True):
        assert all(result["updates"] == [last] for result in stages.values())


def test_losses_go_on_as_if_nothing_had_changed(chain):
    one_rank = {}
    for stages in (stages for _, stages in chain):
        for result in stages.values():
            for step, loss in result["losses"].items():
                assert loss == pytest.approx(one_rank.setdefault(step, loss), abs=1e-6), step
    assert sorted(map(int, one_rank)) == list(range(1, 10))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_average_is_the_fp32_reference_under_every_stage(chain, stage):
    for _, stages in chain:
        assert stages[str(stage)]["ema_error"] <= 1e-6


def test_the_model_beside_the_state_is_the_average(chain):
    folder, _ = chain[2]
    for stage in range(4):
        files, model = StateFiles(folder / f"w4-z{stage}"), load_file(folder / f"w4-z{stage}" / "model.safetensors")
        for name in files.names():
            key = f"average/{name}"
            assert torch.equal(files.read(key, 0, files.numel(key)), model[name].reshape(-1))
        assert {"frozen.weight", "norm.running_mean", "places"} <= model.keys()
        assert "passing" not in model


def go_on(runs, source: str, name: str, step: int, *arguments: str, **settings: object) -> str:
    """A copy of a run that goes on from a step; its output in one line."""
    shutil.copytree(runs.folder(source), runs.folder(name))
    for folder in (runs.folder(name) / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    length = {"train__steps": 12, "train__distill_steps": 4, "checkpoint__every": 2, "data__workers": 0}
    out, error = runs.run(name, "--resume", "auto", *arguments, **(length | settings))
    return " ".join((out + error).split())


def test_a_run_on_1_2_4_and_2_ranks_has_the_losses_of_the_unbroken_one(runs, unbroken):
    told = go_on(runs, unbroken, "on-two", 6, ranks=2, engine__zero=2)
    assert "ranks 1 → 2, engine.zero 0 → 2; a step stays 4 pairs" in told
    told = go_on(runs, "on-two", "on-four", 8, ranks=4, engine__zero=3)
    assert "ranks 2 → 4, engine.zero 2 → 3" in told
    told = go_on(runs, "on-four", "on-two-again", 10, ranks=2, engine__zero=1, engine__timeout_minutes=7)
    assert "ranks 4 → 2, engine.zero 3 → 1; a step" in told
    expected, found = runs.losses(unbroken), runs.losses("on-two-again")
    assert list(found) == list(expected)
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-4), step
    assert_same_weights(runs, "on-two-again", unbroken, 12, tolerance=2e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("engine.precision=bf16", "engine.precision fp32 → bf16"),
        ("train.batch=8", "train.batch 4 → 8"),
        ("engine.deepspeed={prescale_gradients: true}", "engine.deepspeed"),
        ("run.seed=4", "run.seed 3 → 4"),
    ],
)
def test_what_changes_the_losses_is_refused_when_a_run_goes_on(runs, unbroken, change, words):
    path = runs.folder(unbroken) / "checkpoints/step-00000006"
    state = read_state(path)
    digests = {"training": state.index_digest, "validation": state.val_digest}
    with pytest.raises(CheckpointError, match=words + ".*--init"):
        check_fits(path, load_config(path / "config.yaml", [change]), digests)
    with pytest.raises(CheckpointError, match=r"training data's index changed.*--init"):
        check_fits(path, load_config(path / "config.yaml"), digests | {"training": "other"})


def test_who_computes_may_change_when_a_run_goes_on(runs, unbroken):
    path = runs.folder(unbroken) / "checkpoints/step-00000006"
    state = read_state(path)
    changes = ["engine.zero=3", "train.accumulation=2", "engine.stall_minutes=1", "data.workers=0", "run.name=other"]
    config = load_config(path / "config.yaml", changes)
    check_fits(path, config, {"training": state.index_digest, "validation": state.val_digest})
    assert divided_anew(path, config, 2) == "ranks 1 → 2, engine.zero 0 → 3, train.accumulation 1 → 2"
    assert divided_anew(path, load_config(path / "config.yaml"), 1) is None
