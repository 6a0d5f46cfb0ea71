"""Modules that are replayed in tests, and a few steps of learning with them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.train.rerun import RerunRecorder
from train.engine.graphs import Graphs


def image(seed: int, side: int = 64) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


class Out(NamedTuple):
    """As a deblurrer's: several tensors, one that nobody differentiates, None."""

    maps: tuple[Tensor, ...]
    told: Tensor
    absent: None = None


class Small(nn.Module):
    """BatchNorm on batch statistics, a parameter that one stage does not reach, one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.second, self.frozen = nn.Conv2d(5, 2, 3), nn.Conv2d(5, 5, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, *, prior_only: bool = False) -> Out:
        kept = self.frozen(self.norm(self.first(x))).tanh()
        return Out((kept,) if prior_only else (kept, self.second(kept)), kept.detach().mean())


def small() -> Small:
    torch.manual_seed(0)
    return Small()


def graphed(module: nn.Module, **options) -> Graphs:
    return Graphs(module, RerunRecorder(), **options)


def loss_of(out: Out) -> Tensor:
    return sum(m.square().mean() for m in out.maps) + out.told


def learn(
    module: nn.Module, steps: int = 8, accumulation: int = 1, distill: int = 0, loss: Callable = loss_of,
    keep_gradients: bool = False,
) -> tuple[list[float], dict[str, Tensor]]:  # fmt: skip
    """Losses and all of the state after some steps; `keep_gradients`: they are zeroed in place between the steps."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        for part in range(accumulation):
            value = loss(module(image(10 * step + part), prior_only=step < distill)) / accumulation
            value.backward()
            losses.append(value.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=not keep_gradients)
    return losses, {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(found: tuple[list, dict], expected: tuple[list, dict]) -> None:
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())
