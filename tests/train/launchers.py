"""How users start runs: each launcher as a command and an environment, for 2 processes (python: for 1)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("python", "accelerate", "torchrun", "srun")
# Of whoever started the tests: a rank must not take itself for a part of that job.
FOREIGN = ("ACCELERATE_", "SHARPPRIOR_", "SLURM_", "OMPI_", "TORCHELASTIC_", "PMI_")
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ENVIRONMENT")


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without any launcher's variables, one thread a process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN) and key not in PLACE}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | more


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    launcher: str, arguments: Sequence[str], ranks: int = 2, environment: Mapping[str, str] | None = None
) -> list[subprocess.Popen]:
    """Start `train/main.py` with arguments; the processes to wait for (srun: one a rank)."""
    main = [str(ROOT / "train" / "main.py"), *arguments]
    base = dict(environment or clean_environment())

    def process(command: list[str], **more: str) -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=ROOT, env=base | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    if launcher == "python":
        return [process([sys.executable, *main])]
    if launcher == "accelerate":
        launch = [sys.executable, "-m", "accelerate.commands.launch"]
        if ranks > 1:  # the launcher of several processes works without a GPU too
            launch += ["--multi_gpu", "--num_processes", str(ranks), "--num_machines", "1", "--mixed_precision", "no"]
            launch += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
        return [process([*launch, *main])]
    if launcher == "torchrun":
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        return [process([*launch, *main])]
    if launcher == "srun":  # what srun sets for a task of a step, no other variable
        job = str(free_port())  # unlike every other job's: the port depends on it
        step = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_NTASKS": str(ranks), "SLURM_NNODES": "1"}
        step |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_TASKS_PER_NODE": str(ranks), "SLURM_NODEID": "0"}
        return [
            process([sys.executable, *main], **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
            for rank in range(ranks)
        ]
    raise ValueError(f"launcher {launcher!r}: one of {', '.join(LAUNCHERS)}")


def finish(processes: Sequence[subprocess.Popen], timeout: float = 300) -> tuple[int, str]:
    """Wait for all; the largest status and everything they said. What is over time is killed."""
    ends, said, statuses = time.monotonic() + timeout, [], []
    for process in processes:
        try:
            out, _ = process.communicate(timeout=max(1.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            for one in processes:
                one.kill()
            out, _ = process.communicate()
            out += f"\nkilled after {timeout} s"
        said.append(out)
        statuses.append(abs(process.returncode))
    return max(statuses), "\n".join(said)
