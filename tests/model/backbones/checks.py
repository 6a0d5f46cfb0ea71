"""What each network's test asks: the official weights' names, the official outputs, a lesson with the prior."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from torch import nn

from model.summary import summarize
from tests.model.models import RANDOM, SMALL, deblurrer
from train.config.schema import LossSection
from train.engine.network import recompute_blocks
from train.objective.restoration import RestorationLoss

VECTORS = Path(__file__).parent / "vectors"  # NAME.json: keys and shapes; NAME.npz: outputs of the official network


def official_weight(key: str, shape: Sequence[int]) -> torch.Tensor:
    """The tensor that the vectors' network had under this key."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    values = np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape), dtype=np.float32)
    if len(shape) >= 2:
        values = values / np.float32(np.sqrt(np.prod(shape[1:])))
    else:
        values = np.float32(0.1) * values + np.float32(key.endswith("weight"))
    return torch.from_numpy(values)


def assert_official(name: str, build: Callable[..., nn.Module], run: Callable[[nn.Module, torch.Tensor], Sequence]):
    """The network has exactly the official keys and shapes, and gives the official outputs for the vectors' weights.

    run(network, image) → its outputs in the official order.
    """
    facts = json.loads((VECTORS / f"{name}.json").read_text())
    network = build(**facts["config"]).eval()
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == facts["state_dict"]
    weights = {key: value for key, value in network.state_dict().items() if value.is_floating_point()}
    apart = {value.data_ptr(): value.numel() for value in weights.values()}  # one may stand under many names
    assert sum(apart.values()) == facts["parameters"]
    weights = {key: official_weight(key, value.shape) for key, value in weights.items()}
    network.load_state_dict(network.state_dict() | weights)
    shape = facts["input"]["shape"]
    image = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).random(shape, dtype=np.float32))
    with torch.no_grad():
        outputs = [out.numpy() for out in run(network, image)]
    with np.load(VECTORS / f"{name}.npz") as expected:
        assert len(outputs) == len(expected.files)
        for number, out in enumerate(outputs):
            target = expected[f"output_{number}"]
            assert np.abs(out - target).max() <= 1e-5 * np.abs(target).max(), number


def parameters_and_macs(network: nn.Module) -> tuple[float, float]:
    """Millions of parameters, 10⁹ multiply-accumulates of an image of 256×256."""
    counts = summarize(network)
    return counts.parameters / 1e6, counts.macs / 1e9


def assert_learns_with_the_prior(name: str, **loss: object) -> None:
    """30 steps on two crops lower the loss of all outputs; the prior's embeddings take part."""
    small = {"backbone": {"name": name, **SMALL.get(name, {})}, "levels": 2, "spe": {"dim": 8, "groups": 2, "heads": 1}}
    network = deblurrer(teacher=RANDOM, student={"name": "light", "width": 8}, **small)
    crops = [skimage.data.astronaut()[y : y + 16, x : x + 16] for y, x in ((70, 200), (160, 230))]
    sharp = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
    blurry = F.avg_pool2d(F.pad(sharp, (3, 3, 0, 0), mode="replicate"), (1, 7), stride=1)
    restoration = RestorationLoss(LossSection(**loss))
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4)
    losses = []
    for _ in range(31):
        total, _ = restoration(network(blurry).restored, sharp)
        losses.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(bool(spe.attend.scale.abs().sum() > 0) for spe in network.spe.values())


def assert_recomputed(network: nn.Module, side: int) -> None:
    """Recomputing its blocks leaves outputs and gradients as they were, to the bit."""
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        network(image)[-1].square().mean().backward()
        return [p.grad.clone() for p in network.parameters()]

    plain = gradients()
    assert recompute_blocks(network) > 1
    assert all(torch.equal(a, b) for a, b in zip(gradients(), plain, strict=True))


def assert_traced_whole(network: nn.Module, side: int) -> None:
    """torch.compile takes the network as one graph, torch.export too, and channels last is the same network."""
    network = network.eval()
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = network(image)
        torch._dynamo.reset()
        runs = (
            torch.compile(network, fullgraph=True, backend="eager"),
            torch.export.export(network, (image,)).module(),
            lambda x: network(x.contiguous(memory_format=torch.channels_last)),
        )
        for run in runs:
            for one, other in zip(run(image), plain, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
