"""A process finds its place from whichever launcher's variables there are, and ranks that do not fit are named."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from train.engine.launch import FIRST_PORT, PORTS, first_host, place, settle, tasks_on_node
from train.engine.ranks import RankFacts, misfits, rank_lines

SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
    "SLURM_JOB_NODELIST": "gpu[007-008,011],big1",
}
FACTS = RankFacts(0, "a", 0, "cuda", "cuda:0 H100", "id-0", 80 * 2**30, "2.14.1", "0.19.8", "c0ffee")


def test_a_process_that_nobody_launched_is_rank_0_of_1():
    environ: dict[str, str] = {}
    assert settle(environ, gpus=0) == []
    assert [environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")] == [
        "0",
        "0",
        "1",
        "127.0.0.1",
    ]
    assert int(environ["MASTER_PORT"]) > 0
    assert environ["DS_ACCELERATOR"] == "cpu"


def test_torchruns_variables_stay():
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n0",
             "MASTER_PORT": "4321"}  # fmt: skip
    environ = given | SLURM  # torchrun inside a SLURM step
    settle(environ, gpus=8)
    assert {name: environ[name] for name in given} == given


def test_a_task_of_srun():
    found = place(SLURM)
    port = found.pop("MASTER_PORT")
    assert found == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "5",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu007",
    }
    assert FIRST_PORT <= int(port) < FIRST_PORT + PORTS
    assert place(SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})["MASTER_PORT"] == port
    assert place(SLURM | {"SLURM_JOB_ID": "1235"})["MASTER_PORT"] != port
    assert place(SLURM | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != port


def test_a_steps_own_counts_win_over_the_jobs():
    given = SLURM | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu008", "SLURM_STEP_TASKS_PER_NODE": "4"}
    found = place(given | {"SLURM_NODEID": "0", "SLURM_LOCALID": "3"})
    assert (found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"], found["MASTER_ADDR"]) == ("4", "4", "127.0.0.1")


def test_an_address_that_is_given_wins():
    found = place(SLURM | {"MASTER_ADDR": "here", "MASTER_PORT": "7"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("here", "7")


def test_the_batch_script_itself_is_one_process():
    script = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"} | {"ENVIRONMENT": "BATCH"}
    assert place(script)["WORLD_SIZE"] == "1"


def test_a_task_of_mpirun():
    given = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
             "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
    found = place(given)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("1", "2", "127.0.0.1")
    with pytest.raises(ValueError, match="mpirun on several hosts: set MASTER_ADDR"):
        place(given | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x', no number"),
        ({"SLURM_LOCALID": None}, "SLURM_LOCALID is not set"),
        ({"SLURM_PROCID": "5"}, "the launcher says rank 5 of 5"),
        ({"SLURM_JOB_NODELIST": ""}, "no host name found"),
        ({"SLURM_TASKS_PER_NODE": "many"}, "expected a form such as"),
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK is set without MASTER_ADDR"),
    ],
)
def test_odd_variables_are_told(change, reason):
    given = {key: value for key, value in (SLURM | change).items() if value is not None}
    with pytest.raises(ValueError, match=reason):
        place(given)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[07-09,12],x", "n07"),
        ("r[1-2]n[03,5]", "r1n03"),
        ("n[5],m", "n5"),
        ("a-b-1", "a-b-1"),
    ],
)
def test_first_host_of_slurms_short_form(nodes, first):
    assert first_host(nodes) == first


def test_tasks_of_a_node():
    assert [tasks_on_node("2(x3),1", node) for node in range(4)] == [2, 2, 2, 1]


def test_more_ranks_than_gpus_are_refused():
    crowded = SLURM | {"SLURM_LOCALID": "2", "SLURM_TASKS_PER_NODE": "5"}
    with pytest.raises(ValueError, match=r"rank 3 is number 2 of its node, which shows it 2 GPUs: start at most 2"):
        settle(dict(crowded), gpus=2)


def test_the_only_visible_gpu_is_number_0():
    environ = dict(SLURM)
    settle(environ, gpus=1)
    assert environ["LOCAL_RANK"] == "0"


def test_accelerates_settings_go_and_are_told():
    environ = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_DYNAMO_BACKEND": "no", "FSDP_VERSION": "2",
               "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    assert settle(environ, gpus=1) == [
        "accelerate's setting use_cpu true is not used: CUDA_VISIBLE_DEVICES= keeps a run off the GPUs",
        "accelerate's setting mixed_precision fp16 is not used: engine.precision decides",
    ]
    left = {name: value for name, value in environ.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    assert left == {"ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kind": "cpu"}, "different device types: rank 0 on a cuda, rank 1 on b cpu"),
        ({"torch": "2.11.0"}, "different versions of torch: rank 0 on a 2.14.1, rank 1 on b 2.11.0"),
        ({"deepspeed": "0.19.5"}, "different versions of DeepSpeed"),
        ({"config": "dead"}, "different configurations"),
        ({"host": "a"}, "have the same GPU"),
    ],
)
def test_ranks_that_do_not_fit_are_named(change, problem):
    other = replace(FACTS, rank=1, host="b")
    assert misfits([FACTS, other]) is None
    assert problem in misfits([FACTS, replace(other, **change)])


def test_large_jobs_have_a_line_a_host():
    facts = [replace(FACTS, rank=rank, local_rank=rank % 8, host=f"n{rank // 8}") for rank in range(64)]
    lines = rank_lines(facts).splitlines()
    assert len(lines) == 9
    assert lines[2].split()[:3] == ["8–15", "n1", "0–7"]
    assert len(rank_lines(facts[:8]).splitlines()) == 9


MEET = """
import os, sys
from dataclasses import replace
from datetime import timedelta
from train.engine.launch import settle
from train.engine.ranks import meet, my_facts
settle(os.environ, 0)
facts = my_facts("digest")
if len(sys.argv) > 1 and facts.rank == 1:
    facts = replace(facts, **{sys.argv[1]: "other"})
try:
    print(len(meet(facts, int(os.environ["WORLD_SIZE"]), timedelta(seconds=float(os.environ["LIMIT"])))))
except ValueError as error:
    print(error)
    sys.exit(3)
"""


def meeting(ranks: range, *arguments: str, limit: float = 60) -> list[tuple[int, str]]:
    """(status, output) of the ranks of a job of two."""
    from tests.train.launchers import clean_environment, free_port

    base = clean_environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE="2", LIMIT=str(limit))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, *arguments], cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True,
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": os.curdir},
        )
        for rank in ranks
    ]  # fmt: skip
    outs = [process.communicate(timeout=200)[0] for process in started]
    return [(process.returncode, out.strip()) for process, out in zip(started, outs, strict=True)]


def test_ranks_meet():
    assert meeting(range(2)) == [(0, "2"), (0, "2")]


def test_unlike_ranks_are_refused_on_every_rank_at_once():
    for status, said in meeting(range(2), "kind"):
        assert status == 3
        assert "the ranks have different device types" in said


def test_a_missing_rank_is_named():
    ((status, said),) = meeting(range(1), limit=3)
    assert status == 3
    assert "1 of 2 ranks did not come within 0.05 minutes (rank 1)" in said
