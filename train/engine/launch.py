"""Which rank a process is, whoever started it: accelerate, torchrun, srun, mpirun, or nobody."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# accelerate's launcher turns a user's own defaults into these variables; here the YAML file alone decides.
FOREIGN = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")

# What of them is a wish rather than a default, with the values that wish nothing.
WISHES = {
    "ACCELERATE_USE_CPU": ("false", "CUDA_VISIBLE_DEVICES= keeps a run off the GPUs"),
    "ACCELERATE_MIXED_PRECISION": ("no", "engine.precision decides"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "engine.compile decides"),
    "ACCELERATE_USE_FSDP": ("false", "engine.zero decides"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "engine.zero decides"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "engine.zero decides"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "train.accumulation decides"),
    "ACCELERATE_GRADIENT_CLIPPING": ("none", "optim.clip decides"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none", "engine.deepspeed decides"),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("none", "engine.zero decides"),
}
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FIRST_PORT, PORTS = 10000, 20000  # below the range from which systems hand out ports by themselves


def world_size() -> int:
    """Number of ranks, known before anything is initialised. ValueError where a launcher's variables are odd."""
    return int(place(os.environ)["WORLD_SIZE"])


def place(environ: Mapping[str, str]) -> dict[str, str]:
    """The six variables of `PLACE` that torch reads, from whichever launcher's variables are there.

    RANK itself (accelerate, torchrun), else SLURM's of a step, else Open MPI's, else a single process. What is already
    set stays. ValueError where a variable is missing or no number.
    """
    if "RANK" in environ:
        found = _from_torch(environ)
    elif _in_slurm_step(environ):
        found = _from_slurm(environ)
    elif "OMPI_COMM_WORLD_RANK" in environ:
        found = _from_open_mpi(environ)
    else:
        # Also accelerate's launcher of a single process, which sets WORLD_SIZE nowhere and sometimes a port.
        return dict(zip(PLACE, ("0", "0", "1", "1", "127.0.0.1", "0"), strict=True))
    if found["rank"] >= found["world"] or min(found.values()) < 0 or found["world"] < 1:
        raise ValueError(
            f"the launcher says rank {found['rank']} of {found['world']}: start all ranks of a run with one launcher"
        )
    address, port = _meeting_point(environ, found)
    return {
        "RANK": str(found["rank"]),
        "LOCAL_RANK": str(found["local"]),
        "WORLD_SIZE": str(found["world"]),
        "LOCAL_WORLD_SIZE": str(found["local_world"]),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def _asked_of_accelerate(parent: int) -> int:
    """How many processes the command line of a parent that is accelerate's launcher asks for; 1 where it does not."""
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return 1
    if "launch" not in words or not any("accelerate" in word for word in words):
        return 1
    for number, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes"):
            given = value or (words[number + 1] if number + 1 < len(words) else "")
            return int(given) if given.isdigit() else 1
    return 1


def settle(environ: MutableMapping[str, str], gpus: int) -> list[str]:
    """Write the process's place into its environment, free it of foreign settings; returns what is not used and why.

    gpus: devices that this process sees. ValueError where the ranks of this node are more than its GPUs.
    """
    unused = []
    for name, (nothing, reason) in WISHES.items():
        value = environ.get(name, nothing)
        harmless = name == "ACCELERATE_USE_CPU" and not gpus
        if value.lower() not in (nothing, "none", "") and not harmless:
            setting = name.removeprefix("ACCELERATE_").lower()
            unused.append(f"accelerate's setting {setting} {value} is not used: {reason}")
    for name in [name for name in environ if name.startswith(FOREIGN)]:
        del environ[name]
    if "RANK" not in environ and (asked := _asked_of_accelerate(os.getppid())) > 1:
        unused.append(
            f"accelerate's --num_processes {asked} is not used: without --multi_gpu its launcher starts one process; "
            "give --multi_gpu, on CPUs too, or start with torchrun --nproc_per_node"
        )
    found = place(environ)
    if found["MASTER_PORT"] == "0":
        found["MASTER_PORT"] = _free_port()
    if gpus == 1 and int(found["LOCAL_WORLD_SIZE"]) > 1:
        found["LOCAL_RANK"] = "0"  # srun --gpus-per-task: each process sees its own GPU alone, as number 0
    elif gpus and int(found["LOCAL_RANK"]) >= gpus:
        raise ValueError(
            f"rank {found['RANK']} is number {found['LOCAL_RANK']} of its node, which shows it {gpus} GPUs: start at "
            f"most {gpus} ranks a node"
        )
    environ.update(found)
    environ["ACCELERATE_USE_CPU"] = "false"  # "true" would turn DeepSpeed off; the device is chosen by the engine
    environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if not gpus:
        environ["DS_ACCELERATOR"] = "cpu"
    return unused


def first_host(nodes: str) -> str:
    """First host of SLURM's short form: `n[07-09,12],big1` → n07; several brackets take the first of each."""
    name, depth = "", 0
    for letter in nodes:
        if letter == "," and depth == 0:
            break
        depth += {"[": 1, "]": -1}.get(letter, 0)
        name += letter
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", name)
    if not host or "[" in host or "]" in host:
        raise ValueError(f"SLURM_JOB_NODELIST {nodes!r}: no host name found in it; set MASTER_ADDR to rank 0's host")
    return host


def tasks_on_node(tasks: str, node: int) -> int:
    """Tasks of a node in SLURM's short form: `2(x3),1` → 2, 2, 2, 1."""
    counts: list[int] = []
    for part in tasks.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise ValueError(f"SLURM_TASKS_PER_NODE {tasks!r}: expected a form such as 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[node] if node < len(counts) else 1


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    """A task of srun. The batch script has the variables too, but it is one process, whatever SLURM_NTASKS says."""
    in_batch_script = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ
    return "SLURM_PROCID" in environ and not in_batch_script


def _from_torch(environ: Mapping[str, str]) -> dict[str, int]:
    rank, world = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    # Without LOCAL_RANK on several nodes the GPU would be a guess; on one, the rank itself.
    local_world = _number(environ, "LOCAL_WORLD_SIZE", default=world)
    return {
        "rank": rank,
        "world": world,
        "local": _number(environ, "LOCAL_RANK", default=rank % max(1, local_world)),
        "local_world": local_world,
    }


def _from_slurm(environ: Mapping[str, str]) -> dict[str, int]:
    # The step's own counts: `salloc` and `sbatch` leave the whole job's in the others.
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    world, local = _number(environ, count), _number(environ, "SLURM_LOCALID")
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    local_world = tasks_on_node(tasks, _number(environ, "SLURM_NODEID", default=0)) if tasks else world
    return {
        "rank": _number(environ, "SLURM_PROCID"),
        "world": world,
        "local": local,
        "local_world": max(local_world, local + 1),
    }


def _from_open_mpi(environ: Mapping[str, str]) -> dict[str, int]:
    return {
        "rank": _number(environ, "OMPI_COMM_WORLD_RANK"),
        "world": _number(environ, "OMPI_COMM_WORLD_SIZE"),
        "local": _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        "local_world": _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE"),
    }


def _meeting_point(environ: Mapping[str, str], found: dict[str, int]) -> tuple[str, str]:
    """Address and port of rank 0, the same on every rank without asking anybody."""
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    alone = found["local_world"] >= found["world"]
    if "RANK" in environ or (address and port):
        if found["world"] > 1 and not (address and port):
            raise ValueError(
                "RANK is set without MASTER_ADDR and MASTER_PORT: start with torchrun or accelerate launch"
            )
        return address or "127.0.0.1", port or "0"
    if found["world"] == 1:
        return address or "127.0.0.1", port or "0"
    if _in_slurm_step(environ):
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        job, step = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_STEP_ID", "0")
        if not job.isdigit():
            raise ValueError(f"SLURM_JOB_ID {job!r}: expected a number; set MASTER_ADDR and MASTER_PORT instead")
        # Jobs that share a node must not meet: consecutive jobs, and steps of one job, get ports of their own.
        number = int(job) * 16 + (int(step) % 16 if step.isdigit() else 0)
        return address or ("127.0.0.1" if alone else first_host(nodes)), port or str(FIRST_PORT + number % PORTS)
    if not alone:
        raise ValueError("mpirun on several hosts: set MASTER_ADDR to rank 0's host and MASTER_PORT to a free port")
    return address or "127.0.0.1", port or str(FIRST_PORT + os.getppid() % PORTS)


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(
            f"{name} {'is not set' if text is None else f'is {text!r}, no number'}: start with accelerate launch, "
            "torchrun or srun, which set it"
        ) from None


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
