"""One rank of test_scaling: scaling_worker.py ZERO STEPS; rank 0 prints samples/s, bytes and time in collectives, what
the link between the ranks does, and what the plan predicts with that."""

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from tests.model.models import deblurrer
from tests.train.workers.recorder import recorded
from train.config.schema import Config
from train.engine.engine import Engine
from train.plan.cost import Cluster, Work, collectives, gradients_of, step_time

PAIRS, CROP, WARM_UP = 2, 96, 2  # pairs a rank: the work of a rank does not depend on how many there are
LINK_ELEMENTS = 1 << 20


def link(engine: Engine) -> tuple[float, float]:
    """(GB/s of a ring over all ranks, microseconds of a collective without bytes), medians of 15."""

    def seconds(elements: int) -> float:
        tensor, times = torch.ones(elements, device=engine.device), []
        for _ in range(15):
            engine.barrier()
            started = time.perf_counter()
            dist.all_reduce(tensor)
            if tensor.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    sent = 2 * (engine.world - 1) / engine.world * 4 * LINK_ELEMENTS
    return sent / seconds(LINK_ELEMENTS) / 1e9, seconds(1) * 1e6


def main(zero: int, steps: int) -> None:
    from train.engine.launch import world_size

    config = Config(engine={"zero": zero, "cpu_threads": 1}, train={"batch": PAIRS * world_size()})
    engine = Engine(config)
    network = deblurrer(backbone={"name": "unet", "width": 24, "blocks": [1, 1, 2]}, prior=False)
    gradients = gradients_of(network)
    engine.wrap(network)
    engine.set_learning_rates(1e-4, 1e-4)
    generator = torch.Generator().manual_seed(engine.rank)
    blurry, sharp = (torch.rand(PAIRS, 3, CROP, CROP, generator=generator).to(engine.device) for _ in range(2))

    def step() -> None:
        engine.backward_and_step((engine.forward(blurry).restored[0] - sharp).abs().mean())

    synchronise = torch.cuda.synchronize if engine.device.type == "cuda" else None
    for _ in range(WARM_UP):
        step()
    engine.barrier()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if synchronise is not None:
        synchronise()
    engine.barrier()
    seconds = time.perf_counter() - started
    # Apart from the measurement above: on a GPU the recorder takes away the overlap with computation.
    with recorded(synchronise=synchronise) as recorder:
        for _ in range(steps):
            step()
    shares = engine.gather(recorder.share)
    predicted = 0.0
    if engine.world > 1:
        bus, latency = link(engine)
        cluster = Cluster(nodes=1, gpus=engine.world, nvlink=bus, latency=latency)
        predicted = step_time(cluster, Work(0, 0, 0), collectives(config, gradients, zero)).communication
    if engine.main:
        print(
            json.dumps(
                {
                    "step_s": seconds / steps,
                    "predicted_communication_s": predicted,
                    "samples_s": steps * PAIRS * engine.world / seconds,
                    "share_in_collectives": sum(shares) / len(shares),
                    "bytes_a_step": recorder.bytes() / steps,
                    "sent_a_step": sum(one.sent for one in recorder.collectives) / steps,
                    "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
                }
            )
        )
    engine.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
