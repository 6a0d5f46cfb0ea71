"""One rank of test_precision: small networks in bf16 and with 16-bit parameters; rank 0 prints what was found."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.nn.functional as F
from torch import nn

from train.config.schema import Config
from train.engine.average import Ema
from train.engine.engine import Engine
from train.engine.launch import world_size
from train.engine.precision import keep_depthwise_in_fp32, use_sixteen_bit_parameters
from train.engine.settings import deepspeed_settings, parameter_groups

DECAY = 0.9


class Network(nn.Module):
    """Odd sizes, so that pieces begin inside parameters; a frozen BatchNorm with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = nn.Conv2d(3, 7, 3)
        self.norm = nn.BatchNorm2d(7).eval()
        self.norm.running_mean.copy_(torch.linspace(-1, 1, 7))
        self.out = nn.Conv2d(7, 1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.prior(x)).tanh()).flatten(1).mean(1)


class Depthwise(nn.Module):
    """A depthwise convolution between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.depthwise = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6)
        self.out = nn.Conv2d(6, 1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.depthwise(self.enter(x)).tanh()).flatten(1).mean(1)


def make(engine: Engine, precision: str, stage: int, kind: type[nn.Module] = Network, **deepspeed_more) -> None:
    """Put a fresh network under DeepSpeed into the engine."""
    import deepspeed

    torch.manual_seed(0)
    network = kind()
    given = {"zero": stage, "precision": precision, "deepspeed": deepspeed_more}
    engine.config = Config(engine=given, train={"batch": 2}, optim={"clip": 0})
    settings = deepspeed_settings(engine.config, world_size()) | {"zero_allow_untested_optimizer": True}
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    use_sixteen_bit_parameters(network, engine.config.engine, engine.device)
    keep_depthwise_in_fp32(network, engine.config.engine, engine.device)
    optimizer = torch.optim.AdamW(parameter_groups(network, engine.config), lr=1e-3, betas=(0.9, 0.9))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    engine.engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    """The fp32 weights, whole, by DeepSpeed's public call."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}


def step(engine: Engine, number: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(10 * number + engine.rank)
    image = torch.rand(1, 3, 12, 12, generator=generator)
    loss = (engine.forward(image).float() - 1).square().mean() * factor
    engine.backward_and_step(loss)


def averages(engine: Engine, stage: int) -> dict:
    """Differences of our average from one of the gathered master weights, and from one of the rounded parameters."""
    make(engine, "bf16_params", stage)
    ema, reference = Ema(engine, DECAY), masters(engine)
    rounded = {name: value.bfloat16().float() for name, value in reference.items()}
    for number in range(6):
        step(engine, number)
        ema.update()
        decay = min(DECAY, (1 + number) / (10 + number))
        for name, value in masters(engine).items():
            reference[name] = decay * reference[name] + (1 - decay) * value
            rounded[name] = decay * rounded[name] + (1 - decay) * value.bfloat16().float()
    error = max((ema.whole(name) - value).abs().max().item() for name, value in reference.items())
    coarse = max((rounded[name] - value).abs().max().item() for name, value in reference.items())
    image = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    before = engine.module(image).detach()
    with ema.in_place_of_weights():
        inside = engine.module(image).detach()
    after = engine.module(image).detach()
    plain = Network()
    plain.load_state_dict(reference, strict=False)
    with torch.no_grad():
        expected = plain(image)
    parts = torch.tensor([float(sum(count for *_, count in ema.parts()))])
    torch.distributed.all_reduce(parts)
    return {
        "error": error,
        "coarse": coarse,
        "restored": torch.equal(before, after),
        "moved": not torch.equal(before, inside),
        "forward": (inside.float() - expected).abs().max().item(),
        "elements": int(parts.item()),
    }


def overflow(engine: Engine, stage: int) -> list:
    """(step left out, weights moved, loss scale) of steps whose gradients overflow at first."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True  # torch computes fp16 on a CPU, only slowly
    make(engine, "fp16", stage)
    found = []
    for number in range(8):
        before = masters(engine)
        # 2^16 times the gradient leaves the range of fp16 at first, on one rank only.
        step(engine, number, 1.0 if engine.rank == 0 else 1e-3)
        moved = any(not torch.equal(before[name], value) for name, value in masters(engine).items())
        found.append([engine.left_out, moved, engine.loss_scale])
    return found


def depthwise(engine: Engine, stage: int) -> dict:
    """Types of the images that convolutions were given in two steps of bf16, and the weights afterwards."""
    make(engine, "bf16", stage, Depthwise)
    plain, given = F.conv2d, {"depthwise": set(), "others": set()}

    def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        given["others" if groups == 1 else "depthwise"].add(str(dtype))
        return plain(x, weight, bias, stride, padding, dilation, groups)

    F.conv2d = conv2d
    try:
        for number in range(2):
            step(engine, number)
    finally:
        F.conv2d = plain
    whole = masters(engine) if stage else dict(engine.module.named_parameters())
    weights = torch.cat([value.detach().flatten() for value in whole.values()])
    return {name: sorted(types) for name, types in given.items()} | {"weights": weights.tolist()}


if __name__ == "__main__":
    engine = Engine(Config(engine={"cpu_threads": 1}, train={"batch": 2}))
    found = {f"averages/{stage}": averages(engine, stage) for stage in (1, 2, 3)}
    found |= {f"overflow/{stage}": engine.gather(overflow(engine, stage)) for stage in (1, 2, 3)}
    found |= {f"depthwise/{stage}": depthwise(engine, stage) for stage in (0, 1, 2, 3)}
    if engine.main:
        print(json.dumps(found))
