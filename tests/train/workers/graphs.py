"""One rank of test_graphs: a small network under ZeRO 0-2, eager and replayed by the stand-in for CUDA graphs; rank 0
prints, for each case, the replays and whether losses, weights and averages are the same bits."""

import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor, nn

from tests.train.rerun import RerunRecorder
from train.config.schema import Config
from train.engine.average import Ema
from train.engine.capture import RECORDERS
from train.engine.engine import Engine
from train.engine.launch import world_size
from train.engine.precision import autocast, use_sixteen_bit_parameters
from train.engine.settings import deepspeed_settings, parameter_groups

STEPS, DISTILL = 10, 5
CASES = [(0, "fp32", 1), (0, "bf16", 2), (1, "bf16", 2), (1, "bf16_params", 1), (2, "fp32", 2), (2, "bf16_params", 2)]


class Network(nn.Module):
    """Two stages, several results, one of them used by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.prior, self.norm = nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7).eval()
        self.inner, self.out = nn.Conv2d(7, 7, 1), nn.Conv2d(7, 1, 3)

    def forward(self, x: Tensor, *, prior_only: bool = False) -> tuple[Tensor | None, Tensor, Tensor]:
        prior = self.norm(self.prior(x)).tanh()
        return None if prior_only else self.out(self.inner(prior).relu()), prior, prior * 2


def learned(engine: Engine, stage: int, precision: str, accumulation: int, graphs: str) -> dict:
    """Losses, and all weights and averages, after `STEPS`."""
    import deepspeed

    torch.manual_seed(0)
    network = Network()
    given = {"zero": stage, "precision": precision, "graphs": graphs}
    sizes = {"batch": 2 * accumulation * world_size(), "accumulation": accumulation}
    engine.config = Config(engine=given, train=sizes, optim={"clip": 0.1})
    settings = deepspeed_settings(engine.config, world_size()) | {"zero_allow_untested_optimizer": True}
    use_sixteen_bit_parameters(network, engine.config.engine, engine.device)
    optimizer = torch.optim.AdamW(parameter_groups(network, engine.config), lr=1e-2, betas=(0.9, 0.9))
    engine.engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    graphed = engine.replayed(network, "network", agree=engine._first_reason)
    ema, losses = Ema(engine, 0.9), []
    for number in range(STEPS):
        engine.set_learning_rates(1e-2, 1e-2)
        for part in range(accumulation):
            seed = 100 * number + 10 * part + engine.rank
            image = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
            scope = autocast(engine.config.engine, engine.device) if precision == "bf16" else contextlib.nullcontext()
            with scope:
                restored, prior, _ = engine.forward(image, prior_only=number < DISTILL)
            loss = (prior.float() - 0.3).square().mean()
            if restored is not None:
                loss = loss + (restored.float() - 1).abs().mean()
            engine.backward_and_step(loss)
            losses.append(loss.item())
        ema.update()
    state = {f"weight {name}": p.detach().clone() for name, p in network.named_parameters()}
    state |= {f"average {name}": value.clone() for name, value in ema.averages.items()}
    return {"losses": losses, "state": state, "replays": 0 if graphed is None else graphed.replays}


def main() -> None:
    engine = Engine(Config(engine={"cpu_threads": 1}, train={"batch": 2}))
    RECORDERS["cpu"] = RerunRecorder
    found = {}
    for case in CASES:
        eager, replayed = (learned(engine, *case, graphs) for graphs in ("off", "on"))
        same = {name: torch.equal(value, eager["state"][name]) for name, value in replayed["state"].items()}
        facts = {
            "replays": replayed["replays"],
            "losses": replayed["losses"] == eager["losses"],
            "learned": eager["losses"][-1] < eager["losses"][DISTILL * case[2]],
            "other": sorted(name for name, equal in same.items() if not equal),
        }
        found["/".join(map(str, case))] = engine.gather(facts)
    if engine.main:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
