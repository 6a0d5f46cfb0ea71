"""One rank of test_scaling: scaling_worker.py ZERO STEPS; rank 0 prints samples/s, bytes and time in collectives."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from model.deblurrer import build_deblurrer
from train.collectives import recorded
from train.config import Config
from train.engine import Engine

PAIRS, CROP, WARM_UP = 2, 96, 2  # pairs a rank: the work of a rank does not depend on how many there are


def main(zero: int, steps: int) -> None:
    from train.launch import world_size

    config = Config(engine={"zero": zero, "cpu_threads": 1}, train={"batch": PAIRS * world_size()})
    engine = Engine(config)
    engine.wrap(build_deblurrer(backbone={"name": "unet", "width": 24, "blocks": [1, 1, 2]}, prior=False))
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
    if engine.main:
        print(
            json.dumps(
                {
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
