"""Two ranks, every ZeRO stage: the loss or the gradients of rank 1 alone are not finite. Prints what each rank saw as
JSON; `test_robustness_nonfinite` starts it and judges."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import contextlib
import hashlib

import deepspeed
import torch
from torch import nn

from train.config.schema import Config
from train.engine.engine import Engine
from train.engine.settings import deepspeed_settings
from train.engine.zero import zero3_gathered
from train.run.step import training_step
from train.watch.signals import StopRequest
from train.watch.traces import Traces

CASES = ("good", "gradient", "loss", "good")


class Net(nn.Module):
    """A weight and the ways in which it can go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 64).view(8, 8))

    def forward(self, x: torch.Tensor, case: str) -> torch.Tensor:
        y = (x @ self.weight).square().mean()
        if case == "gradient":
            return y + (self.weight * 0).sqrt().sum()  # 0, and its gradient is NaN
        return y * float("nan") if case == "loss" and x.any() else y


class Task:
    """Stands for `DeblurTask`."""

    def losses(self, forward, batch, *, distill, autocast, cfl=None):
        loss = forward(batch["sharp"], batch["case"])
        return loss, {"pixel": loss.detach()}


def digest(module: nn.Module) -> str:
    with zero3_gathered(list(module.parameters())):
        return hashlib.sha256(module.weight.detach().numpy().tobytes()).hexdigest()


def config_of(zero: int, clip: float) -> Config:
    return Config.model_validate(
        {
            "train": {"batch": 2, "steps": 10},
            "optim": {"clip": clip, "warmup": 0},
            "engine": {"zero": zero},
            "model": {"prior": False},
        }
    )


def main(folder: Path) -> None:
    engine = Engine(config_of(0, 1.0))
    seen = []
    for zero, clip in ((0, 1.0), (0, 0.0), (1, 1.0), (2, 1.0), (3, 1.0)):
        config = engine.config = config_of(zero, clip)
        module = Net()
        groups = [{"params": list(module.parameters()), "part": "restorer"}]
        engine.engine, *_ = deepspeed.initialize(
            model=module, optimizer=torch.optim.AdamW(groups), config=deepspeed_settings(config, engine.world)
        )
        stop, traces = StopRequest(), Traces(folder, engine.rank, engine.world, engine.device)
        for step, case in enumerate(CASES):
            mine = case if engine.rank == 1 else "good"
            x = torch.ones(1, 8)
            batch = {
                "case": mine,
                "sharp": x,
                "blurry": x,
                "key": [f"{case}-{engine.rank}"],
                "epoch": torch.tensor([0]),
            }
            before = digest(engine.module)
            with contextlib.redirect_stdout(sys.stderr):
                result = training_step(engine, Task(), iter([batch]), step, stop, traces)
            seen.append(
                {
                    "zero": zero, "clip": clip, "case": case, "finite": result.finite, "not_finite": result.not_finite,
                    "moved": digest(engine.module) != before, "weights": digest(engine.module),
                    "keys": [batch["key"] for batch in result.batches],
                }
            )  # fmt: skip
    (folder / f"seen-{engine.rank}.json").write_text(json.dumps(seen))
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
