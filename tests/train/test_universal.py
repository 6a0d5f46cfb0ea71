"""A run goes on with other ranks, under another ZeRO stage: the same state, bit for bit, the same losses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.universal import StateFiles

WORKER = Path(__file__).with_name("states_worker.py")
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
