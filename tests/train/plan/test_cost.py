"""The plan of a run on a cluster: its bytes are those that small runs move and write."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from train.cli.app import app
from train.config.file import build_config, load_config
from train.config.networks import build_model
from train.plan.cost import (
    Cluster,
    Collective,
    Gradients,
    Stage,
    StepTime,
    Work,
    best_stage,
    checkpoint_bytes,
    collectives,
    gradients_of,
    loader_need,
    operators_of,
    step_time,
)
from train.plan.report import allowed_stages, stages_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SMALL = {
    "model": {"backbone": {"name": "unet", "width": 8, "blocks": [1, 1]}, "levels": 3},
    "data": {"crop": 64},
    "train": {"batch": 64},
}


def config(**engine):
    return build_config({**SMALL, "engine": engine}, {})


def test_a_ring_sends_each_byte_but_its_own_part_and_an_all_reduce_twice():
    assert Collective("all_gather", "parameters", 800).wire(4) == 600
    assert Collective("all_reduce", "gradients", 800).wire(4) == 1200
    assert Collective("all_reduce", "gradients", 800).wire(1) == 0


def test_the_slowest_link_of_the_ring_counts():
    assert Cluster(1, 8, nvlink=450, network=50).bus == 450
    assert Cluster(2, 8, nvlink=450, network=50).bus == 50
    assert Cluster(2, 1, nvlink=10, network=50).bus == 50


def test_a_step_is_bound_by_arithmetic_and_memory_or_by_launches():
    cluster = Cluster(1, 1, tflops=1, utilisation=0.5, hbm=1, launch=10, latency=0)
    assert step_time(cluster, Work(1e12, 1e9, 10), []).compute == pytest.approx(3.0)
    assert step_time(cluster, Work(0, 0, 1e6), []).compute == pytest.approx(10.0)


def test_views_are_not_counted_as_launches():
    class Net(nn.Module):
        def forward(self, x):
            return (x.view(-1).reshape(3, -1).t() + 1).mul_(2)

    assert operators_of(Net(), 4) == 2


def test_the_fastest_stage_that_fits_is_advised():
    def stage(zero, fits, seconds):
        return Stage(zero, 0.0, fits, [], StepTime(seconds, 0.0))

    assert best_stage([stage(0, False, 1.0), stage(1, True, 2.0), stage(3, True, 3.0)]).zero == 1
    assert best_stage([stage(1, True, 2.0), stage(2, True, 2.0)]).zero == 1
    assert best_stage([stage(0, False, 1.0)]) is None


def test_a_small_gpu_gets_a_higher_stage():
    fitting = [stage.zero for stage in stages_of(config(), Cluster(8, 8, memory=0.04)) if stage.fits]
    assert 3 in fitting
    assert 0 not in fitting


def test_only_stages_that_the_settings_allow_are_planned():
    assert allowed_stages(config()) == [0, 1, 2, 3]
    assert allowed_stages(config(zero=1, precision="bf16_params")) == [1, 2, 3]
    assert allowed_stages(config(zero=3, offload_parameters="cpu")) == [3]


def test_autocast_gradients_of_convolutions_travel_in_two_bytes():
    gradients = gradients_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)))
    assert gradients == Gradients(112 + 10, 8, 6)
    (reduced, gathered) = collectives(config(zero=2, precision="bf16"), gradients, 2)
    assert (reduced.payload, gathered.payload) == (2 * 122 + 4 * 8, 4 * 130)


def test_a_node_of_a_large_cluster_loads_its_part():
    need = loader_need(config(), Cluster(4, 8), StepTime(0.5, 0.5), sample_bytes=1e5)
    assert need.pairs == 16
    assert need.megabytes == pytest.approx(1.6)


def test_the_checkpoint_has_the_planned_size(runs, unbroken):
    folder = runs.folder(unbroken) / "checkpoints" / "step-00000012"
    found = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    written = load_config(folder / "config.yaml")
    with torch.device("meta"):
        network = build_model(written)
    assert checkpoint_bytes(network) == pytest.approx(found, rel=0.05)


def test_the_command_prints_a_plan_and_says_where_the_batch_does_not_divide(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text("data: {crop: 64}\ntrain: {batch: 64}\nmodel: {levels: 3}\n")
    app(["plan", "--config", str(path), "--nodes", "4", "--gpus", "8"], standalone_mode=False)
    out = capsys.readouterr().out
    assert "4 nodes × 8 GPUs = 32 ranks" in out
    assert "Take ZeRO 0" in out
    assert "does not divide" not in out
    app(["plan", "--config", str(path), "--nodes", "3", "--gpus", "5"], standalone_mode=False)
    out = " ".join(capsys.readouterr().out.split())
    assert "train.batch 64 does not divide among 15 ranks × 1 accumulation steps, so no run would start: planned" in out
    assert "75 pairs a step = 15 × 1 accumulation × 5" in out


def test_a_cluster_without_speed_is_refused():
    with pytest.raises(ValueError, match="--network 0"):
        Cluster(2, 8, network=0)


@pytest.mark.parametrize(
    ("zero", "precision", "accumulation"),
    [(0, "fp32", 2), (1, "bf16", 2), (2, "fp32", 2), (2, "bf16", 1), (3, "bf16", 2)],
)
def test_two_ranks_move_the_planned_bytes(runs, tmp_path, zero, precision, accumulation):
    settings = {
        "engine__zero": zero, "engine__precision": precision, "train__accumulation": accumulation,
        "train__steps": 3, "train__distill_steps": 0, "data__workers": 0, "checkpoint__every": 9,
    }  # fmt: skip
    out = tmp_path / "moved.json"
    command = runs.command(f"moved{zero}{precision}", ranks=2, **settings)
    main = next(n for n, word in enumerate(command) if word.endswith("main.py"))
    command[main : main + 1] = [str(Path(__file__).parents[1] / "workers" / "counted_run.py"), str(out)]
    done = subprocess.run(command, env=runs.environment(), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.device("meta"):
        network = build_model(load_config(runs.folder(f"moved{zero}{precision}") / "config.yaml"))
    planned: dict[str, int] = {}
    written = build_config({**SMALL, "engine": {"zero": zero, "precision": precision}}, {})
    written = written.model_copy(update={"train": written.train.model_copy(update={"accumulation": accumulation})})
    for moved in collectives(written, gradients_of(network), zero):
        planned[moved.op] = planned.get(moved.op, 0) + moved.payload
    counted = json.loads(out.read_text())[-1]
    if zero in (1, 2):  # DeepSpeed would allocate 5e8 elements
        assert counted["bucket"] == sum(counted["gradients"][:2])
    last = counted["moved"]  # ZeRO-3 traces its first two steps
    for operation, payload in planned.items():
        # Norms, flags and the padding of buckets come on top.
        assert payload <= last[operation] <= 1.01 * payload + 4096, operation
    for operation in last.keys() - planned.keys():
        assert last[operation] <= 16384, operation


def test_what_a_large_cluster_waits_for_is_in_the_step():
    work, moved = Work(1e15, 0, 0), [Collective("all_reduce", "gradients", 0)]
    one, many = step_time(Cluster(1, 1), work, []), step_time(Cluster(64, 8), work, moved, updated=1e6)
    assert one.total == one.compute
    assert many.wait == pytest.approx(0.03 * many.compute * (2 * math.log(512)) ** 0.5)
    assert many.communication == pytest.approx(30e-6 * 7)  # a tree over 64 nodes is 6 deeper than one node's
    assert many.update > 0
    assert many.efficiency < 0.92


def test_a_plan_that_sees_few_photographs_for_ever_says_so(sharpprior):
    status, out, _ = sharpprior("plan", "--config", "configs/large.yaml", "--set", "train.batch=8", "--gpus", "1")
    assert status == 0
    assert "times: is this the data that the run is meant for?" in " ".join(out.split())
    assert "communication, ms" in out  # heads are whole where there is no terminal
