"""Ranks, ZeRO stages, accumulation and precision change who computes, not what is learned."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.studies.matrix import COVERING, TOLERANCE, Cell, cells, difference, run, tiny_run
from tests.train.launchers import clean_environment, finish, start
from tests.train.weights import assert_same_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def one_process(runs) -> str:
    """The reference of the ranks: 6 steps in one process without ZeRO, in two micro-batches."""
    runs.run("one", train__steps=6, train__distill_steps=2, checkpoint__every=3)
    return "one"


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_ranks_under_zero_have_the_losses_of_one_process(runs, one_process, zero):
    name = f"zero{zero}"
    settings = {"train__steps": 6, "train__distill_steps": 2, "checkpoint__every": 3, "engine__zero": zero}
    runs.run(name, ranks=2, **settings)
    expected, found = runs.losses(one_process), runs.losses(name)
    assert found.keys() == expected.keys()
    for step in expected:
        assert found[step] == pytest.approx(expected[step], abs=1e-4), step
    assert_same_weights(runs, name, one_process, 6, tolerance=2e-3)
    one, two = (
        next(r for r in runs.records(n) if r["step"] == 6 and "tiers" in r)["tiers"] for n in (one_process, name)
    )
    assert [row["pairs"] for row in one] == [row["pairs"] for row in two]
    for a, b in zip(one, two, strict=True):
        assert a["restored_psnr"] == pytest.approx(b["restored_psnr"], abs=0.02)
        assert a["yardsticks"] == b["yardsticks"]


def test_zero_3_on_two_ranks_resumes_bit_identically(runs, one_process):
    settings = {"train__steps": 6, "train__distill_steps": 2, "checkpoint__every": 3, "engine__zero": 3}
    if not runs.folder("zero3").exists():
        runs.run("zero3", ranks=2, **settings)
    before = runs.losses("zero3")
    folder = runs.folder("zero3again")
    shutil.copytree(runs.folder("zero3"), folder)
    shutil.rmtree(folder / "checkpoints/step-00000006")
    runs.run("zero3again", "--resume", "auto", ranks=2, **settings)
    assert runs.losses("zero3again") == before
    assert_same_weights(runs, "zero3again", "zero3", 6, tolerance=0)


@pytest.mark.parametrize("zero", [2, 3])
def test_a_gate_learns_alike_on_two_ranks_under_zero(runs, zero):
    settings = {"train__steps": 4, "train__distill_steps": 1, "checkpoint__every": 4, "model__gate": True}
    if not runs.folder("gated").exists():
        runs.run("gated", **settings)
    runs.run(f"gated{zero}", ranks=2, engine__zero=zero, **settings)
    expected, found = runs.losses("gated"), runs.losses(f"gated{zero}")
    assert found == {step: pytest.approx(loss, abs=1e-4) for step, loss in expected.items()}
    assert_same_weights(runs, f"gated{zero}", "gated", 4, tolerance=2e-3)


@pytest.fixture(scope="session")
def references(runs, one_process, tmp_path_factory) -> tuple[dict, Path, list[str]]:
    """Losses of one process by precision, a folder for the runs of the matrix, and their common arguments."""
    root = tmp_path_factory.mktemp("matrix")
    base = tiny_run(root)
    bf16, _ = run(Cell("python", 0, "bf16", 1), root, base)
    return {"fp32": runs.losses(one_process), "bf16": bf16}, root, base


@pytest.mark.parametrize("cell", COVERING, ids=lambda cell: cell.name)
def test_launcher_stage_precision_and_accumulation_do_not_change_what_is_learned(references, cell):
    losses, root, base = references
    found, _ = run(cell, root, base)
    assert difference(losses[cell.precision], found) <= TOLERANCE[cell.precision]


def test_the_matrix_is_covered():
    for name in ("launcher", "zero", "precision", "accumulation"):
        every = {getattr(cell, name) for cell in cells()} - {"python"}
        assert {getattr(cell, name) for cell in COVERING} == every
    assert len(cells()) == len({cell.name for cell in cells()}) == 64


POISON = """compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
mixed_precision: fp16
use_cpu: true
num_machines: 1
num_processes: 1
deepspeed_config:
  zero_stage: 3
  gradient_accumulation_steps: 4
  gradient_clipping: 0.001
  offload_optimizer_device: cpu
dynamo_config:
  dynamo_backend: INDUCTOR
"""


def test_a_users_own_accelerate_configuration_changes_nothing(runs, one_process, tmp_path):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(POISON)
    poisoned = clean_environment(
        HF_HOME=str(tmp_path), ACCELERATE_USE_FSDP="true", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="3"
    )
    arguments = runs.command("poisoned", train__steps=6, train__distill_steps=2, checkpoint__every=3)[2:]
    status, said = finish(start("accelerate", arguments, ranks=1, environment=poisoned))
    assert status == 0, said[-3000:]
    assert runs.losses("poisoned") == runs.losses(one_process)
    assert "ZeRO 0, fp32" in " ".join(said.split())
    assert "mixed_precision fp16 is not used: engine.precision decides" in " ".join(said.split())


def test_a_run_starts_with_the_table_of_its_ranks(runs, one_process):
    lines = (runs.folder(one_process) / "log.txt").read_text().splitlines()
    head = next(number for number, line in enumerate(lines) if line.endswith("ranks:"))
    assert lines[head + 1].split()[:3] == ["rank", "host", "local"]
    assert lines[head + 2].split()[0] == "0"
    assert torch.__version__ in lines[head + 2]
