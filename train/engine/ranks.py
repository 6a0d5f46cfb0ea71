"""The ranks of a run meet: each says what it is, all check that they fit together, then the process group begins."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version

import torch
import torch.distributed as dist


class RanksError(ValueError):
    """Ranks that are missing, or do not fit together; names them."""


@dataclass(frozen=True)
class RankFacts:
    """What a rank is. memory: of its GPU, else of its host, bytes; device_id: equal only for one and the same GPU."""

    rank: int
    host: str
    local_rank: int
    kind: str
    device: str
    device_id: str
    memory: int
    torch: str
    deepspeed: str
    config: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def my_facts(config_digest: str) -> RankFacts:
    """Of this process, whose place is in the environment (`train.engine.launch`)."""
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(local)
        kind, device, memory = "cuda", f"cuda:{local} {found.name}", found.total_memory
        device_id = str(getattr(found, "uuid", local))
    else:
        kind, device, device_id = "cpu", f"cpu, {len(os.sched_getaffinity(0))} cores", ""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return RankFacts(
        rank=int(os.environ["RANK"]),
        host=socket.gethostname(),
        local_rank=local,
        kind=kind,
        device=device,
        device_id=device_id,
        memory=memory,
        torch=torch.__version__,
        deepspeed=version("deepspeed"),
        config=config_digest,
    )


def misfits(facts: Sequence[RankFacts]) -> str | None:
    """Why these ranks cannot train together, or None. The first rank that differs from rank 0 is named."""
    first = facts[0]
    for name, what in (
        ("kind", "device types"),
        ("torch", "versions of torch"),
        ("deepspeed", "versions of DeepSpeed"),
        ("config", "configurations (digests)"),
    ):
        other = next((fact for fact in facts if getattr(fact, name) != getattr(first, name)), None)
        if other is not None:
            return (
                f"the ranks have different {what}: {first} {getattr(first, name)}, {other} {getattr(other, name)}: "
                "make all nodes alike"
            )
    seen: dict[tuple[str, str], RankFacts] = {}
    for fact in facts:
        if fact.device_id:
            twin = seen.setdefault((fact.host, fact.device_id), fact)
            if twin is not fact:
                return f"{twin} and {fact} have the same GPU ({fact.device}): start at most one rank a GPU"
    return None


def meet(mine: RankFacts, world: int, timeout: timedelta) -> list[RankFacts]:
    """Wait for all ranks, check them, begin torch's process group (nccl on GPUs, else gloo); facts in rank order.

    Facts travel before the group begins, over a plain TCP store: a group of unlike ranks would hang instead of telling.
    RanksError (on every rank) where ranks are missing after `timeout` or do not fit.
    """
    # torchrun's and accelerate's agents already hold a store at this address.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(
            address, port, None, is_master=mine.rank == 0 and not agent, timeout=timeout, wait_for_workers=False
        )
    except (dist.DistError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RanksError(
            f"{mine} cannot meet the others at {address}:{port} ({reason}): is rank 0 running there, the port free and "
            "open? MASTER_ADDR and MASTER_PORT choose another"
        ) from error
    # A launcher that restarts its ranks keeps its store: each start has keys of its own.
    common = dist.PrefixStore(f"sharpprior/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    common.set(f"facts/{mine.rank}", json.dumps(asdict(mine)))
    facts = [RankFacts(**json.loads(_wait(common, rank, world, timeout))) for rank in range(world)]
    problem = misfits(facts)
    _leave_together(common, mine.rank, world, timeout)
    if problem is not None:
        raise RanksError(problem)
    device = torch.device("cuda", mine.local_rank) if mine.kind == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device is not None else "gloo",
        store=dist.PrefixStore("group", common),
        rank=mine.rank,
        world_size=world,
        timeout=timeout,
        device_id=device if world > 1 else None,
    )
    return facts


def rank_lines(facts: Sequence[RankFacts]) -> str:
    """The ranks of a run as a table in text: a line a rank, or a line a host where there are more than 32."""
    head = ("rank", "host", "local", "device", "memory, GiB", "torch", "deepspeed")
    rows = [head, *((str(f.rank), f.host, str(f.local_rank), f.device, *_rest(f)) for f in facts)]
    if len(facts) > 32:
        hosts: dict[str, list[RankFacts]] = {}
        for fact in facts:
            hosts.setdefault(fact.host, []).append(fact)
        rows = [head]
        for host, there in hosts.items():
            names = sorted({fact.device.partition(" ")[2] or fact.device for fact in there})
            local = f"{there[0].local_rank}–{there[-1].local_rank}"
            rows.append((f"{there[0].rank}–{there[-1].rank}", host, local, ", ".join(names), *_rest(there[0])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _rest(fact: RankFacts) -> tuple[str, str, str]:
    return f"{fact.memory / 2**30:.1f}", fact.torch, fact.deepspeed


def _wait(store: dist.Store, rank: int, world: int, timeout: timedelta) -> bytes:
    """A rank's facts; RanksError naming all that have not come."""
    try:
        return store.get(f"facts/{rank}")
    except (dist.DistError, RuntimeError) as error:
        missing = [str(other) for other in range(world) if not store.check([f"facts/{other}"])]
        raise RanksError(
            f"{len(missing)} of {world} ranks did not come within {timeout.total_seconds() / 60:g} minutes (rank "
            f"{', '.join(missing[:16])}): look at the logs of their nodes; engine.timeout_minutes sets the limit"
        ) from error


def _leave_together(store: dist.Store, rank: int, world: int, timeout: timedelta) -> None:
    """Rank 0 holds the store: it must not leave (with an error) before the others have read it."""
    store.set(f"read/{rank}", b"1")
    if rank == 0:
        store.wait([f"read/{other}" for other in range(world)], timeout)
