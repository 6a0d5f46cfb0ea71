"""Trains one SPE on two CPU ranks (gloo) under DDP or ZeRO-3 and compares with one process (test_integration)."""

import os
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp

from model.spe import SemanticPriorEmbedding

STEPS, BATCH, LR = 3, 4, 1e-2


def build() -> SemanticPriorEmbedding:
    torch.manual_seed(0)
    spe = SemanticPriorEmbedding([6, 10], channels=24, dim=16, groups=4, heads=3)
    torch.nn.init.normal_(spe.attend.scale)
    return spe


def batch(step: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    rng = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 24, 8, 8, generator=rng), [
        torch.randn(BATCH, c, s, s, generator=rng) for c, s in ((6, 4), (10, 2))
    ]


def shard(tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    return tensor.chunk(world)[rank]


def single() -> list[float]:
    spe = build()
    optimizer = torch.optim.SGD(spe.parameters(), lr=LR)
    losses = []
    for step in range(STEPS):
        x, levels = batch(step)
        loss = spe(x, levels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def rank_main(rank: int, world: int, strategy: str, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    spe = build()
    optimizer = torch.optim.SGD(spe.parameters(), lr=LR)
    if strategy == "ddp":
        engine = torch.nn.parallel.DistributedDataParallel(spe)
    else:
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for a minute
        config = {
            "train_micro_batch_size_per_gpu": BATCH // world,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # DeepSpeed clips to 1 unless told
        }
        engine, optimizer, _, _ = deepspeed.initialize(model=spe, optimizer=optimizer, config=config)
        assert spe.attend.query_weight.numel() == 0, "ZeRO-3 did not shard the parameters"
    losses = []
    for step in range(STEPS):
        x, levels = batch(step)
        out = engine(shard(x, rank, world), [shard(level, rank, world) for level in levels])
        loss = out.square().mean()
        if strategy == "ddp":
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            engine.backward(loss)
            engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / world)
    if rank == 0:
        expected = single()
        assert expected[-1] < expected[0], expected
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(exist_ok=True)
    mp.spawn(rank_main, args=(2, sys.argv[1], sys.argv[2]), nprocs=2)
