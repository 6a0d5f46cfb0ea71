"""A SLURM cluster of several nodes on this machine, for tests: one slurmctld, one slurmd per node, nothing shared.

Works as root and as a normal user. Own ports, own folder, no munge, no change to the system's own SLURM; every process
is started here and ended here by its id.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

SETTINGS = """\
ClusterName=sharpprior
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
# Every process is this user's, on this machine: nobody to authenticate.
AuthType=auth/none
CredType=cred/none
# A requeued job may start when its old credential has expired; the default is two minutes.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
# A node's death is noticed, and a job's processes are killed, in seconds instead of minutes.
SlurmdTimeout={node_timeout}
KillWait={kill_wait}
InactiveLimit=0
ReturnToService=2
MailProg=/bin/true
SlurmdParameters=config_overrides
{gres} CPUs=2 RealMemory=4096 State=UNKNOWN
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")


class ClusterError(RuntimeError):
    """The cluster cannot start or did not do what was waited for; the message holds the daemons' last lines."""


@dataclass
class Job:
    """What SLURM knows about a job."""

    state: str
    restarts: int
    exit_code: str
    nodes: str


def search_path() -> str:
    """PATH with the system's own folders, where Debian puts the daemons and a normal user does not look."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def missing() -> list[str]:
    """SLURM's programs that are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]


class Cluster:
    """`nodes` nodes n1, n2, … of two CPUs and `gpus` pretended GPUs each. Use as a context manager."""

    def __init__(self, folder: Path, nodes: int, *, gpus: int = 0, node_timeout: int = 20, kill_wait: int = 2) -> None:
        self.folder = folder
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self._processes: dict[str, subprocess.Popen] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state").mkdir()
        self.conf = folder / "slurm.conf"
        # SLURM hands out GPUs by their number; no program finds any behind these files.
        gres = f"GresTypes=gpu\nNodeName=DEFAULT Gres=gpu:{gpus}" if gpus else "NodeName=DEFAULT"
        devices = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random"][:gpus]
        if gpus:
            (folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
        control, *ports = _free_ports(nodes + 1)
        host = socket.gethostname().split(".")[0]
        self.conf.write_text(
            SETTINGS.format(
                host=host, port=control, first_job=_first_job(), gres=gres,
                user=getpass.getuser(), folder=folder,
                node_timeout=node_timeout, kill_wait=kill_wait,
                nodes="\n".join(
                    f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
                    for node, port in zip(self.nodes, ports, strict=True)
                ),
            )
        )  # fmt: skip

    # -- daemons ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        # Clears up when this process lets go of the pipe: at the end, or killed in the middle.
        self._janitor = subprocess.Popen(
            [sys.executable, __file__, str(self.conf)], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for node in self.nodes:
                self.start_node(node)
            self.until(lambda: self.idle_nodes() == set(self.nodes), 30, f"all of {self.nodes} to be idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._janitor.communicate()
        for process in self._processes.values():
            process.wait()

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """What a power cut does: slurmd, its step daemons and all their tasks are gone at once, without a word."""
        slurmd = psutil.Process(self._processes[node].pid)
        ours = [process for process in psutil.process_iter() if is_ours(process, self.conf)]
        tasks = [process for process in ours if environment_of(process).get("SLURMD_NODENAME") == node]
        # A step daemon has left slurmd's process tree, and only its tasks know their node.
        daemons = {parent for task in tasks for parent in task.parents() if parent.name().startswith("slurmstepd")}
        kill([slurmd, *daemons, *tasks])
        self._processes[node].wait()

    def _start(self, key: str, program: str, *arguments: str) -> None:
        with open(self.folder / f"{key}.out", "ab") as out:
            self._processes[key] = subprocess.Popen(
                [program, *arguments, "-f", str(self.conf)], env=self.environment(), stdin=subprocess.DEVNULL,
                stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Of a program that talks to this cluster; nothing of another cluster or job shines through."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
        return kept | {"SLURM_CONF": str(self.conf), "PATH": search_path()}

    # -- commands -----------------------------------------------------------------------------------------------------

    def command(self, *arguments: str, check: bool = True, cwd: Path | None = None, **environment: str) -> str:
        """Output of a SLURM command."""
        done = subprocess.run(
            arguments, env=self.environment() | environment, capture_output=True, text=True, timeout=60, cwd=cwd
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(arguments)}: status {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def job(self, number: int) -> Job:
        """State of a job."""
        text = self.command("scontrol", "show", "job", str(number), "--oneliner")

        def value(name: str) -> str:
            found = re.search(rf"\b{name}=(\S*)", text)
            return found.group(1) if found else ""

        return Job(value("JobState"), int(value("Restarts") or 0), value("ExitCode"), value("NodeList"))

    def wait(self, number: int, seconds: float) -> Job:
        """The job after its end. ClusterError if it has not ended after `seconds`."""
        self.until(lambda: self.job(number).state in ENDED, seconds, f"job {number} to end")
        return self.job(number)

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for a condition. ClusterError after `seconds`."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise ClusterError(f"waited {seconds:.0f} s for {what}\n{self.tail()}")
            status = self._processes["slurmctld"].poll()
            if status is not None:
                raise ClusterError(f"slurmctld ended with status {status}\n{self.tail()}")
            time.sleep(0.2)

    def clear(self) -> None:
        """Cancel whatever is queued or runs, and wait for free nodes: a failed test must not block the next."""
        self.command("scancel", "--user", getpass.getuser(), check=False)
        self.until(lambda: self.idle_nodes() == set(self.nodes), 60, "the nodes to be idle again")

    def idle_nodes(self) -> set[str]:
        """Nodes that wait for a job."""
        lines = self.command("sinfo", "-h", "-N", "-o", "%N %t", check=False).split("\n")
        return {line.split()[0] for line in lines if line.endswith(" idle")}

    def tail(self, lines: int = 12) -> str:
        """The daemons' last lines and the queue, for a failed test."""
        parts = [self.command("squeue", "-o", "%i %T %r %N", check=False), self.command("sinfo", "-N", check=False)]
        for path in sorted(self.folder.glob("*.out")):
            parts += [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(parts)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, held open together so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _first_job() -> int:
    """Number of the first job: the script's ports follow from it, and another cluster may run on this machine."""
    while True:
        first = random.SystemRandom().randrange(15000, 29900)
        try:
            for port in range(first, first + 50):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first  # the script's port is 15000 + number mod 15000: the number itself


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Variables that a process was started with; none if it is gone or somebody else's."""
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def is_ours(process: psutil.Process, conf: Path) -> bool:
    """Whether a process belongs to the cluster: daemons and jobs inherit the variable, but a step daemon writes its
    title over it; that one listens in the cluster's folder."""
    if environment_of(process).get("SLURM_CONF") == str(conf):
        return True
    with contextlib.suppress(psutil.Error, OSError):
        if process.name().startswith("slurmstepd"):
            sockets = getattr(process, "net_connections", process.connections)("unix")
            return any(str(each.laddr).startswith(f"{conf.parent}/") for each in sockets)
    return False


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL, at once."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def clear_up(conf: Path) -> None:
    """End every process of a cluster; again, for one that was starting another."""
    while found := [
        process
        for process in psutil.process_iter()
        if is_ours(process, conf) and process.status() != psutil.STATUS_ZOMBIE
    ]:
        kill(found)
        time.sleep(0.05)


if __name__ == "__main__":
    sys.stdin.read()
    clear_up(Path(sys.argv[1]))
