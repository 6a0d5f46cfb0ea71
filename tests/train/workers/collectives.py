"""One rank of test_collectives: a step of a small network under every ZeRO stage; rank 0 prints what was issued."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist
from torch import nn

from tests.train.workers.recorder import recorded
from train.config.schema import Config
from train.engine.engine import Engine
from train.engine.launch import world_size
from train.engine.settings import deepspeed_settings

SIZES = (16, 32, 8)


def step(stage: int, micro_batches: int) -> dict:
    """Operation → [calls, bytes] of one step, and the seconds and share that were measured."""
    import deepspeed

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(SIZES[0], SIZES[1]), nn.Linear(SIZES[1], SIZES[2]))
    config = Config(
        engine={"zero": stage}, train={"batch": 2 * micro_batches, "accumulation": micro_batches}, optim={"clip": 0}
    )
    settings = deepspeed_settings(config, world_size()) | {"zero_allow_untested_optimizer": True}
    if stage == 3:  # every parameter is divided, however small
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    optimizer = torch.optim.AdamW(network.parameters())
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    for _ in range(3):  # the first steps of ZeRO 3 learn and compare the order of the parameters
        with recorded() as recorder:
            for _ in range(micro_batches):
                engine.backward(engine(torch.ones(1, SIZES[0])).square().mean())
                engine.step()
    operations = {name: [calls, size] for name, (calls, size, _) in recorder.by_operation().items()}
    sent = sum(one.sent for one in recorder.collectives)
    return {"operations": operations, "seconds": recorder.seconds, "share": recorder.share, "sent": sent}


def plain() -> list:
    """[operation, bytes, dtype, group] of torch's own calls, one of each form; the functions are back afterwards."""
    before = dist.all_reduce, dist.distributed_c10d.all_gather
    with recorded() as recorder:
        dist.all_reduce(torch.ones(5, dtype=torch.float64), async_op=True).wait()
        dist.all_gather([torch.empty(3), torch.empty(3)], torch.ones(3))
        dist.all_gather_into_tensor(output_tensor=torch.empty(4), input_tensor=torch.ones(2))
        dist.broadcast(torch.ones(7, dtype=torch.int8), 0)
        dist.reduce(torch.ones(3), dst=0)
        dist.reduce_scatter_tensor(torch.empty(2), torch.ones(4))
    assert (dist.all_reduce, dist.distributed_c10d.all_gather) == before
    assert all(one.seconds > 0 for one in recorder.collectives)
    return [[one.operation, one.size, str(one.dtype), one.group] for one in recorder.collectives]


if __name__ == "__main__":
    rank = Engine(Config(engine={"cpu_threads": 1}, train={"batch": 2})).rank
    found: dict = {"plain": plain()}
    found |= {f"{stage}/{micro}": step(stage, micro) for stage in range(4) for micro in (1, 2)}
    if rank == 0:
        print(json.dumps(found))
