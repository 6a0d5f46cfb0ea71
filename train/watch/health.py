"""Before training: does every rank compute, and do numbers that are summed and sent arrive whole."""

from __future__ import annotations

import socket
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from train.engine.engine import Engine
from train.log import log

SLOW = 2.0  # times the median
COUNT = 1 << 20  # numbers in a collective, 4 MiB
REPEATS = 5


@dataclass(frozen=True)
class Health:
    """What a rank measured. matmul_s: seconds of one matrix product; sum_s: of one all-reduce of 4 MiB."""

    rank: int
    host: str
    matmul_s: float
    sum_s: float


def check_health(engine: Engine) -> list[Health]:
    """Time and check all ranks; every rank calls this. ValueError naming what came out wrong, and where; a rank that is
    slower than twice the median is named in the log."""
    with engine.agreed():
        matmul_s = matmul_seconds(engine.device)
    sum_s = 0.0
    if engine.world > 1:
        with engine.agreed():
            sum_s = _check_collectives(engine)
    ranks = engine.gather(Health(engine.rank, socket.gethostname(), matmul_s, sum_s))
    for line in slow_lines(ranks) if engine.main else []:  # elsewhere a warning would go to stderr, once a rank
        log.warning(line)
    products, slowest_sum = [1000 * rank.matmul_s for rank in ranks], 1000 * max(rank.sum_s for rank in ranks)
    log.info(
        f"health: {len(ranks)} ranks on {len({rank.host for rank in ranks})} hosts, matrix product "
        f"{statistics.median(products):.2f} ms (slowest {max(products):.2f}), all-reduce of 4 MiB {slowest_sum:.2f} ms"
    )
    return ranks


def matmul_seconds(device: torch.device) -> float:
    """Shortest of a few timings of a matrix product, whose result is checked. ValueError if it is wrong."""
    side = 2048 if device.type == "cuda" else 256
    ones = torch.ones(side, side, device=device)
    scaled = torch.arange(side, device=device, dtype=torch.float32).expand(side, side)
    best = float("inf")
    for _ in range(REPEATS):
        _wait_for(device)
        started = time.perf_counter()
        product = ones @ scaled
        _wait_for(device)
        best = min(best, time.perf_counter() - started)
    # Small whole numbers: exact in fp32, and in TF32 to its 11 bits.
    if not torch.allclose(product, side * scaled, rtol=2e-3):
        raise ValueError(
            f"{socket.gethostname()}, {device}: a matrix product came out wrong: this device computes nonsense; take "
            "it out of the job"
        )
    return best


def _check_collectives(engine: Engine) -> float:
    base = torch.arange(COUNT, device=engine.device, dtype=torch.float32) % 1024
    best = float("inf")
    for _ in range(REPEATS):
        mine = base + engine.rank
        _wait_for(engine.device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(mine)
        _wait_for(engine.device)
        best = min(best, time.perf_counter() - started)
    check_numbers("an all-reduce", mine, base * engine.world + engine.world * (engine.world - 1) // 2)
    last = engine.world - 1
    sent = base + 7 if engine.rank == last else torch.zeros_like(base)
    dist.broadcast(sent, last)
    check_numbers(f"a broadcast from rank {last}", sent, base + 7)
    return best


def check_numbers(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """ValueError naming the first difference of two tensors."""
    wrong = (found != expected).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"{what} of known numbers arrived wrong on {socket.gethostname()}: {float(found[at])} instead of "
            f"{float(expected[at])} at {at} ({len(wrong)} of {found.numel()} differ): check the network and its driver"
        )


def slow_lines(ranks: list[Health]) -> list[str]:
    """A line for every rank that computes slower than twice the median."""
    median = statistics.median_low(rank.matmul_s for rank in ranks)
    return [
        f"slow: rank {rank.rank} on {rank.host} takes {1000 * rank.matmul_s:.2f} ms for a matrix product, the median "
        f"of the ranks is {1000 * median:.2f} ms: every step will wait for it"
        for rank in ranks
        if rank.matmul_s > SLOW * median
    ]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
