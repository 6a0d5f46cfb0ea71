"""slurm/train_multinode.sh on a real SLURM cluster: two nodes, a signal with its requeue, a node's death, a crash."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 40


@pytest.fixture(scope="session")
def hostile_defaults(tmp_path_factory):
    """Somebody's answers to `accelerate config`, none of which suits the job."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "accelerate").mkdir()
    (folder / "accelerate" / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_processes: 7\nnum_machines: 3\n"
        "machine_rank: 2\nmain_process_ip: 203.0.113.9\nmain_process_port: 1\nmixed_precision: fp16\n"
        "use_cpu: true\ndebug: true\nrdzv_backend: c10d\nsame_network: false\n"
    )
    return {"HF_HOME": str(folder), "ACCELERATE_USE_FSDP": "true", "RANK": "5", "WORLD_SIZE": "9", "MASTER_PORT": "1"}


@pytest.fixture(scope="session")
def whole(jobs, hostile_defaults) -> str:
    """A job that nothing happens to."""
    number = jobs.submit("whole", train__steps=STEPS, checkpoint__every=10, environment=hostile_defaults)
    jobs.wait(number, "whole")
    return "whole"


def test_two_nodes_train_under_zero_2(jobs, whole):
    said = jobs.said(whole)
    assert re.search(r"node 0 n1: ranks 0 to 0, .*torch", said), said
    assert re.search(r"node 1 n2: ranks 1 to 1, .*deepspeed", said)
    assert "2 ranks, 1 a node; they meet at 127.0.0.1:" in said
    assert "training finished" in said
    assert set(jobs.logs(whole)) == {"0", "1"}
    assert "2 ranks on cpu, ZeRO 2" in jobs.logs(whole)["0"]
    losses = jobs.losses(whole)
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert all(0 < loss < 3 for _, loss in losses)
    state = jobs.state(whole, STEPS)
    assert (state["step"], state["world"], state["zero"]) == (STEPS, 2, 2)
    assert not (jobs.runs.folder(whole) / "STOP").exists()
    assert not (jobs.runs.folder(whole) / "STOPPED").exists()


def test_a_signalled_job_saves_requeues_itself_and_ends_as_the_unbroken_one(jobs, whole):
    number = jobs.submit("signalled", train__steps=STEPS, checkpoint__every=1000, data__workers=1)
    # As a preemption does it: TERM to every process of the step, launchers and loader workers too. (The time limit's
    # way, a signal to the batch script, is tested with a stand-in below: the file STOP reaches the ranks.)
    jobs.until_step("signalled", 3)
    jobs.cluster.command("scancel", "--signal=TERM", str(number))
    job = jobs.wait(number, "signalled")
    assert job.restarts == 1, jobs.everything("signalled")
    said, log = jobs.said("signalled"), jobs.logs("signalled")["0"]
    (stop,) = (int(step) for step in re.findall(r'stopped with a checkpoint: .*"step": (\d+)', said))
    assert 3 <= stop < STEPS
    assert re.findall(r"(?s)resumed\s.*?\sat\s+step\s+(\d+)", log) == [str(stop)]
    assert jobs.losses("signalled") == jobs.losses(whole)


def test_a_job_whose_node_dies_goes_on_elsewhere_and_ends_as_the_unbroken_one(jobs, whole):
    number = jobs.submit("orphan", train__steps=STEPS, checkpoint__every=5)
    jobs.until_step("orphan", 6)
    dead = "n2"
    assert jobs.cluster.job(number).nodes == "n[1-2]"
    jobs.cluster.kill_node(dead)
    try:
        jobs.cluster.until(lambda: jobs.cluster.job(number).restarts == 1, 120, "the requeue")
        job = jobs.wait(number, "orphan")
    finally:
        jobs.cluster.start_node(dead)
    assert (job.restarts, job.nodes) == (1, "n[1,3]")
    # Whoever notices first, our script or SLURM, names the node.
    assert re.search(r"(Node failure on|which do not answer:) n2", jobs.said("orphan")), jobs.said("orphan")
    assert re.search(r"(?s)resumed\s.*?\sat\s+step\s+\d+\s+of", jobs.logs("orphan")["0"])
    assert jobs.losses("orphan") == jobs.losses(whole)


def test_a_crash_is_not_requeued(jobs):
    name = "2026"  # to YAML no string
    number = jobs.submit(name, "--nodes=1", train__steps=2, optim__lr="fast")
    job = jobs.wait(number, name, "FAILED")
    assert (job.restarts, job.exit_code) == (0, "1:0")
    said = jobs.said(name)
    assert "error: --set optim.lr=fast: optim.lr: Input should be a valid number" in said
    assert "Traceback" not in said
    assert "every node answers, so the run itself failed: not requeued" in said
    command = re.search(r"Mended\? (.*)", said).group(1)  # can be typed as it is
    root, run_name, *rest = shlex.split(command)
    assert (root, run_name) == (f"RUN_ROOT={jobs.root / 'runs'}", f"RUN_NAME={name}")
    assert rest[:4] == ["sbatch", "--nodes=1", "slurm/train_multinode.sh", str(jobs.root / "tiny.yaml")]


# Ranks as the script knows them: a signal or the file STOP ends them in good order.
OBEDIENT = """
while not os.path.exists(run + "/STOP"):
    time.sleep(0.1)
stopped("file STOP")
"""
FAILING = """
if node == 0:
    time.sleep(60)
time.sleep(1)
print("out of paper", flush=True)
sys.exit(3)
"""


def test_a_preempted_job_comes_back_and_goes_on(decisions):
    number = decisions.submit("preempted", "if restart: sys.exit()\n" + OBEDIENT, "--nodes=3")
    decisions.until_running("preempted", 3)
    urgent = decisions.cluster.command(
        "sbatch", "--parsable", "--partition=urgent", "--output=/dev/null", "--nodes=3", "--exclusive", "--wrap=true"
    )
    decisions.wait(int(urgent), "preempted", seconds=60)
    job = decisions.wait(number, "preempted", seconds=60)
    assert job.restarts == 1, decisions.everything("preempted")
    assert "SIGTERM" in decisions.said("preempted")


def test_a_job_near_its_time_limit_stops_and_comes_back_only_so_often(decisions):
    # One minute is SLURM's shortest limit; a signal 60 seconds before it comes as soon as SLURM looks.
    number = decisions.submit("limit", OBEDIENT, "--time=1", "--signal=B:USR2@60", MAX_RESTARTS="0")
    job = decisions.wait(number, "limit", "FAILED", seconds=90)
    said = decisions.said("limit")
    assert (job.restarts, job.exit_code) == (0, "75:0"), decisions.everything("limit")
    assert "signal USR2: asking the run for a checkpoint" in said
    assert "restarted 0 times already (MAX_RESTARTS=0): not requeued" in said


ON_A_DYING_NODE = """
if restart:
    sys.exit()
while node == 1 or not os.path.exists(run + "/dead"):
    time.sleep(0.1)
print("connection closed by peer", flush=True)
sys.exit(1)
"""


def test_a_dead_node_is_named_and_its_job_requeued_before_slurm_notices(decisions):
    number = decisions.submit("bereaved", ON_A_DYING_NODE)
    decisions.until_running("bereaved")
    decisions.cluster.kill_node("n2")
    try:
        (decisions.root / "runs" / "bereaved" / "dead").touch()
        job = decisions.wait(number, "bereaved", seconds=90)
    finally:
        decisions.cluster.start_node("n2")
    said = decisions.said("bereaved")
    assert "node 0 n1 ended first, with status 1" in said, said
    assert "dead nodes, which do not answer: n2 (ranks 1 to 1); requeueing" in said
    assert (job.restarts, job.nodes) == (1, "n[1,3]")


def test_a_stop_that_a_person_asked_for_is_not_requeued(decisions):
    number = decisions.submit("asked", OBEDIENT)
    decisions.until_running("asked")
    (decisions.root / "runs" / "asked" / "STOP").touch()
    job = decisions.wait(number, "asked", "FAILED", seconds=60)
    assert (job.restarts, job.exit_code) == (0, "75:0")
    assert "somebody made" in decisions.said("asked")
    assert "RUN_NAME=asked sbatch --nodes=2 slurm/train_multinode.sh" in decisions.said("asked")


def test_a_cancelled_job_stays_cancelled(decisions):
    number = decisions.submit("cancelled", OBEDIENT)
    decisions.until_running("cancelled")
    decisions.cluster.command("scancel", str(number))
    job = decisions.wait(number, "cancelled", "CANCELLED", seconds=60)
    decisions.cluster.until(lambda: "SLURM has ended this job" in decisions.said("cancelled"), 30, "the last word")
    assert job.restarts == 0


def test_the_first_failure_is_the_one_that_is_told(decisions):
    number = decisions.submit("failing", FAILING)
    job = decisions.wait(number, "failing", "FAILED", seconds=60)
    assert (job.restarts, job.exit_code) == (0, "3:0"), decisions.everything("failing")
    assert "node 1 n2 ended first, with status 3" in decisions.said("failing")
    assert "out of paper" in decisions.said("failing")


def test_the_script_submits_as_it_is_and_by_environment(decisions):
    decisions.cluster.command("sbatch", "--test-only", "slurm/train_multinode.sh", cwd=ROOT)
    values = decisions.values("bash", "pass") | {"NODES": "3", "SBATCH_OUTPUT": str(decisions.output("bash"))}
    said = decisions.cluster.command("bash", str(ROOT / "slurm" / "train_multinode.sh"), cwd=decisions.root, **values)
    number = int(said.split()[-1])
    decisions.wait(number, "bash", seconds=60)
    assert "3 ranks, 1 a node" in decisions.said("bash")


@pytest.mark.parametrize(
    ("options", "environment", "ranks"),
    [
        ([], {}, "4 ranks, 2 a node"),
        (["--gpus-per-node=1", "--oversubscribe"], {}, "2 ranks, 1 a node"),
        ([], {"GPUS_PER_NODE": "1"}, "2 ranks, 1 a node"),
        ([], {"GPUS_PER_NODE": "0", "PROCS_PER_NODE": "3"}, "6 ranks, 3 a node"),
    ],
)
def test_every_gpu_of_a_node_gets_a_process_unless_fewer_are_wanted(gpu_decisions, options, environment, ranks):
    name = f"gpus-{len(options)}-{len(environment)}-{ranks[0]}"
    number = gpu_decisions.submit(name, "pass", *options, COUNT_GPUS="1", **environment)
    gpu_decisions.wait(number, name, seconds=60)
    assert ranks in gpu_decisions.said(name), gpu_decisions.said(name)


def test_more_gpus_than_the_job_has_are_refused(gpu_decisions):
    number = gpu_decisions.submit("greedy", "pass", GPUS_PER_NODE="4")
    gpu_decisions.wait(number, "greedy", "FAILED", seconds=60)
    assert "GPUS_PER_NODE=4, but the job has 2 on a node: sbatch --gpus-per-node=4" in gpu_decisions.said("greedy")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed: pip install -e .[test]")
def test_shellcheck_has_nothing_to_say():
    subprocess.run(["shellcheck", *sorted((ROOT / "slurm").glob("*.sh")), ROOT / ".ci" / "run"], check=True)


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"NODES": "5"}, "NODES=5, but the job has 2: sbatch --nodes=5"),
        ({"GPUS_PER_NODE": "4"}, "GPUS_PER_NODE=4, but the nodes have n1:0 n2:0"),
        ({"VENV": "/nowhere"}, "VENV=/nowhere is no virtual environment"),
        ({"SITE": "/nowhere.sh"}, "SITE=/nowhere.sh: cannot read it"),
        ({"CONFIG": "/nowhere.yaml"}, "/nowhere.yaml: cannot read this configuration"),
        ({"UNFIT": "1"}, "error: n2: "),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(decisions, environment, told):
    name = f"refused-{next(iter(environment))}"
    number = decisions.submit(name, "pass", **environment)
    job = decisions.wait(number, name, "FAILED", seconds=60)
    assert (job.restarts, job.exit_code) == (0, "1:0")
    assert told in decisions.said(name)
    assert decisions.logs(name) == {}  # nothing was launched


def test_a_run_folder_that_the_script_could_not_follow_is_refused(decisions):
    environment = decisions.cluster.environment() | {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT)}
    for arguments in (["--set", "run.name=other"], ["--set=run.root=elsewhere"]):
        done = subprocess.run(
            ["bash", "slurm/train_multinode.sh", "configs/quickstart.yaml", *arguments], cwd=ROOT, env=environment,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.endswith("set RUN_ROOT and RUN_NAME instead\n")
