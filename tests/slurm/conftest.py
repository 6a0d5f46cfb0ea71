"""One SLURM cluster of three nodes for the session, and runs that are submitted to it as a user would."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, ClusterError, missing
from tests.train.runs import TINY, Runs

ROOT = Path(os.path.abspath(__file__)).parents[2]


def cannot(reason: str) -> None:
    """Skip, or fail where CI demands that these tests run."""
    if os.environ.get("SHARPPRIOR_CI"):
        pytest.fail(f"SHARPPRIOR_CI is set, and SLURM must be tested: {reason}")
    pytest.skip(f"no SLURM to test with: {reason}")


def started(folder: Path, nodes: int, **settings: int) -> Iterator[Cluster]:
    """A running cluster, ended at the end."""
    absent = missing()
    if absent:
        cannot(f"{', '.join(absent)} not found (Debian: apt-get install slurm-wlm)")
    try:
        cluster = Cluster(folder, nodes, **settings).__enter__()
    except (ClusterError, OSError) as error:
        cannot(str(error))
    yield cluster
    cluster.__exit__()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Three nodes; what a test kills it starts again."""
    yield from started(tmp_path_factory.mktemp("slurm") / "cluster", 3)


@pytest.fixture(scope="module")
def gpu_decisions(tmp_path_factory) -> Iterator[Decisions]:
    """Stand-ins for training on two nodes of two GPUs. A cluster of its own: SLURM 22.05 loses count of a job's GPUs
    when it is requeued while one of its nodes is dead."""
    for cluster in started(tmp_path_factory.mktemp("slurm") / "cluster", 2, gpus=2):
        yield Decisions(cluster, tmp_path_factory.mktemp("gpu_decisions"))


class Jobs:
    """Submits tiny trainings with slurm/train_multinode.sh and reads what they left."""

    def __init__(self, cluster: Cluster, root: Path) -> None:
        self.cluster = cluster
        self.runs = Runs(root)
        self.root = root

    def submit(self, name: str, *options: str, environment: dict[str, str] | None = None, **changes: object) -> int:
        """Number of a job for the run `name`; options: sbatch's; changes: configuration keys with `__` for dots."""
        values = {"data.train": self.runs.train, "data.val": self.runs.val, **TINY, "engine.zero": 2}
        values |= {"data.workers": 0, "eval.per_tier": 1, "eval.panels": 1}
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        script = ["slurm/train_multinode.sh", str(self.root / "tiny.yaml")]
        for key, value in values.items():
            script += ["--set", f"{key}={value}"]
        out = self.cluster.command(
            "sbatch", "--parsable", f"--output={self.output(name)}", *options, *script, cwd=ROOT,
            RUN_ROOT=str(self.root / "runs"), RUN_NAME=name, OMP_NUM_THREADS="1", COLUMNS="150",
            PATH=f"{Path(sys.executable).parent}:{self.cluster.environment()['PATH']}", **(environment or {}),
        )  # fmt: skip
        return int(out)

    def output(self, name: str) -> Path:
        """The batch script's output."""
        return self.root / f"{name}.out"

    def said(self, name: str) -> str:
        """What the batch script said."""
        return self.output(name).read_text() if self.output(name).exists() else ""

    def logs(self, name: str) -> dict[str, str]:
        """What each node's processes said, by the node's number in the job."""
        paths = (self.runs.folder(name) / "slurm").glob("*.log")
        return {path.name.split(".")[1]: path.read_text() for path in sorted(paths)}

    def everything(self, name: str) -> str:
        """All that can explain a failure."""
        parts = [self.said(name), *(f"--- node {node}\n{text[-3000:]}" for node, text in self.logs(name).items())]
        return "\n".join([*parts, self.cluster.tail()])

    def wait(self, number: int, name: str, state: str = "COMPLETED", seconds: float = 600):
        """The job after it has ended in `state`."""
        job = self.cluster.wait(number, seconds)
        assert job.state == state, f"{job}\n{self.everything(name)}"
        return job

    def until_step(self, name: str, step: int, seconds: float = 600) -> None:
        """Wait until a run has done a step."""
        self.cluster.until(lambda: self.steps(name) >= step, seconds, f"step {step} of {name}\n{self.said(name)}")

    def steps(self, name: str) -> int:
        """The last step that a run has written down."""
        path = self.runs.folder(name) / "metrics.jsonl"
        if not path.exists():
            return 0
        return max((int(found) for found in re.findall(r'"step": (\d+), "loss"', path.read_text())), default=0)

    def losses(self, name: str) -> list[tuple[int, float]]:
        """Step and loss of every line of metrics.jsonl, in its order: a step that was counted twice is there twice."""
        return [(record["step"], record["loss"]) for record in self.runs.records(name) if "loss" in record]

    def state(self, name: str, step: int) -> dict:
        """What a checkpoint says about itself."""
        return json.loads((self.runs.folder(name) / f"checkpoints/step-{step:08d}/run.json").read_text())


@pytest.fixture(scope="session")
def jobs(cluster, tmp_path_factory) -> Jobs:
    """One place for all runs on the cluster."""
    return Jobs(cluster, tmp_path_factory.mktemp("somebody's jobs"))


FAKE_PYTHON = """\
#!{python} -IS
# Stands in for Python: `check` reports, training is the code in $TRAINING.
import os, signal, sys, time
node, run = int(os.environ["SLURM_NODEID"]), os.path.join(os.environ["RUN_ROOT"], os.environ["RUN_NAME"])
if sys.argv[1] == "-":
    if os.environ.get("UNFIT") == str(node):
        sys.exit("no torch here")
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if "COUNT_GPUS" in os.environ else [""]
    print("node", node, os.environ["SLURMD_NODENAME"], sum(map(bool, devices)), 1, "-", "no versions", sep="\\t")
    sys.exit()

def stopped(reason):
    if node == 0:
        open(run + "/STOPPED", "w").write('{{"step": 7, "reason": "%s"}}\\n' % reason)
    sys.exit()

restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
signal.signal(signal.SIGTERM, lambda *_: stopped("SIGTERM"))
print("running", flush=True)
exec(os.environ["TRAINING"])
"""


class Decisions(Jobs):
    """Jobs of our script with a stand-in for training: what the script decides, in a second each."""

    def __init__(self, cluster: Cluster, root: Path) -> None:
        self.cluster, self.root = cluster, root
        (root / "bin").mkdir()
        (root / "bin" / "activate").write_text(f"PATH={root}/bin:$PATH\n")
        (root / "bin" / "python").write_text(FAKE_PYTHON.format(python=sys.executable))
        (root / "bin" / "python").chmod(0o755)
        (root / "tiny.yaml").write_text("{}\n")

    def values(self, name: str, training: str) -> dict[str, str]:
        """Environment of a job."""
        return {
            "CONFIG": str(self.root / "tiny.yaml"), "RUN_ROOT": str(self.root / "runs"), "RUN_NAME": name,
            "VENV": str(self.root), "TRAINING": training,
        }  # fmt: skip

    def submit(self, name: str, training: str, *options: str, **environment: str) -> int:
        """Number of a job; training: Python code for each node, with `stopped(reason)`, `node`, `restart`."""
        command = ["sbatch", "--parsable", f"--output={self.output(name)}", *options, "slurm/train_multinode.sh"]
        return int(self.cluster.command(*command, cwd=ROOT, **self.values(name, training) | environment))

    def logs(self, name: str) -> dict[str, str]:
        paths = (self.root / "runs" / name / "slurm").glob("*.log")
        return {path.name.split(".")[1]: path.read_text() for path in sorted(paths)}

    def until_running(self, name: str, nodes: int = 2) -> None:
        """Wait until all nodes are in their training."""
        self.cluster.until(
            lambda: sum("running" in text for text in self.logs(name).values()) == nodes, 60, f"{name} to run"
        )


@pytest.fixture(scope="session")
def decisions(cluster, tmp_path_factory) -> Decisions:
    """Where stand-ins for training run."""
    return Decisions(cluster, tmp_path_factory.mktemp("decisions"))


@pytest.fixture(autouse=True)
def free_nodes(cluster):
    """Nothing of a test is left when the next one starts."""
    yield
    cluster.clear()
