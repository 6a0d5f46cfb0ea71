"""Run by the tests of the state on several ranks: a small network trained under every ZeRO stage, its state
written, and taken up by other ranks under other stages.

states.py ROOT FROM TO    FROM: number of ranks whose states under ROOT to start from, 0: none; TO: last step

Writes ROOT/w<ranks>-z<stage>/ (state, model) and w<ranks>.json: losses, and how far things are from what they should
be. DeepSpeed's own gathering calls say what the state is, and not the code that is tested.
"""

import json
import os
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.checkpoint.model import write_model
from train.checkpoint.state import StateFiles, read_state_into, write_state
from train.config.file import configure
from train.config.schema import Config
from train.engine.average import Ema
from train.engine.engine import Engine, set_launch_defaults
from train.engine.launch import world_size
from train.engine.pieces import MOMENTS, pieces
from train.engine.settings import deepspeed_settings, parameter_groups

BATCH, DECAY = 8, 0.9


class Network(nn.Module):
    """Odd sizes, so that no partition is even; a frozen layer, buffers, one element, groups with and without decay."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.prior = nn.Linear(3, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.middle = nn.Conv2d(7, 13, 3, padding=1)
        self.norm = nn.BatchNorm2d(13).eval()
        self.out = nn.Conv2d(13, 1, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("places", torch.arange(3))
        self.register_buffer("passing", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.prior(x).relu()).permute(0, 3, 1, 2)
        return self.out(self.norm(self.middle(x)).tanh()).flatten(1).mean(1) * self.scale


def make(config: Config, stage: int, source: Path | None) -> tuple[types.SimpleNamespace, Ema]:
    """As much of an Engine as the state needs, under a ZeRO stage of its own."""
    import deepspeed

    module = Network()
    module.norm.eval()
    optimizer = torch.optim.AdamW(parameter_groups(module, config), lr=1e-2, betas=config.optim.betas)
    settings = deepspeed_settings(config, world_size())
    if stage == 3:  # as small as the network: nothing would be partitioned otherwise
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 20
    inner, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    rank, world = dist.get_rank(), dist.get_world_size()
    place = {"rank": rank, "world": world, "main": rank == 0, "device": torch.device("cpu")}
    engine = types.SimpleNamespace(engine=inner, module=inner.module, config=config, **place)
    engine.gather = lambda thing: Engine.gather(engine, thing)
    engine.agreed = lambda: Engine.agreed(engine)
    ema = Ema(engine, DECAY)
    if source is not None:
        with torch.no_grad():  # whatever is not taken up shows
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                local = tensor.ds_tensor if hasattr(tensor, "ds_id") else tensor.data
                if name != "passing":
                    local.fill_(77)
        read_state_into(source, engine, ema)
    return engine, ema


def gathered(engine: types.SimpleNamespace, stage: int) -> dict[str, Tensor]:
    """Weights and moments, whole, by DeepSpeed's public calls; for ZeRO 0 by torch's optimizer itself."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if stage in (1, 2):  # DeepSpeed 0.19.8 links the states once, when only the first group has any
        engine.engine.optimizer._hp_optimizer_states_linked = False
        engine.engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            state = engine.engine.optimizer.state[parameter]
            values = [parameter.data, *(state[key] for key in MOMENTS)]
        else:
            values = [safe_get_full_fp32_param(parameter)]
            values += [safe_get_full_optimizer_state(parameter, key) for key in MOMENTS]
        for key, value in zip(("weight", *MOMENTS), values, strict=True):
            found[f"{key}/{name}"] = value.detach().clone().reshape(-1)
    return found


def same_bits(files: StateFiles, expected: dict[str, Tensor]) -> bool:
    """Whether the files hold exactly these tensors."""
    return all(torch.equal(files.read(key, 0, value.numel()), value) for key, value in expected.items())


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step, whoever computes it: [8, 4, 4, 3] and its targets."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 4, 4, 3, generator=generator)
    return x, x.mean((1, 2, 3)).sin()


def run(root: Path, stage: int, source: Path | None, first: int, last: int) -> dict:
    config = configure([f"engine.zero={stage}", f"train.batch={BATCH}", "optim.clip=0.5"])
    engine, ema = make(config, stage, source)
    rank, world = engine.rank, engine.world
    taken_up = True
    if source is not None:
        files = StateFiles(source)
        taken_up = same_bits(files, gathered(engine, stage)) and ema.updates == files.averaged == first
        taken_up &= all(piece.updates == first for piece in pieces(engine))
        for name in ema.averages:
            whole = ema.whole(name).reshape(-1)
            taken_up &= torch.equal(whole, files.read(f"average/{name}", 0, whole.numel()))
    reference = {name: ema.whole(name).clone() for name in ema.averages}
    losses = {}
    for step in range(first, last):
        x, y = (part.chunk(world)[rank] for part in batch(step))
        loss = (engine.engine(x) - y).square().mean()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses[step + 1] = float(mean) / world
        engine.engine.backward(loss)
        engine.engine.step()
        ema.update()
        decay = min(DECAY, (1 + step) / (10 + step))
        now = gathered(engine, stage)
        for name, average in reference.items():
            average.mul_(decay).add_(now[f"weight/{name}"].view(average.shape), alpha=1 - decay)
    target = root / f"w{world}-z{stage}"
    if rank == 0:
        target.mkdir(parents=True)
    dist.barrier()
    write_state(target, engine, ema)
    write_model(target, engine, ema, config)
    dist.barrier()
    expected = gathered(engine, stage)
    written = same_bits(StateFiles(target), expected)
    everyone = engine.gather((taken_up, written))
    away = max(float((ema.whole(name) - average).abs().max()) for name, average in reference.items())
    return {
        "losses": losses,
        "taken_up": all(a for a, _ in everyone),
        "written": all(b for _, b in everyone),
        "ema_error": away,
        "updates": sorted({piece.updates for piece in pieces(engine)}),
    }


def main() -> None:
    root, before, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    set_launch_defaults()
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    world = dist.get_world_size()
    results = {}
    for stage in range(4):
        # Each stage takes up what another one wrote, and over the launches every stage is read and written.
        source = root / f"w{before}-z{(stage + 1) % 4}" if before else None
        first = json.loads((root / f"w{before}.json").read_text())["last"] if before else 0
        results[stage] = run(root, stage, source, first, last)
    if dist.get_rank() == 0:
        (root / f"w{world}.json").write_text(json.dumps({"last": last, "stages": results}))
    dist.barrier()
    os._exit(0)  # several engines in one process: their destructors disagree about the process group


if __name__ == "__main__":
    main()
