"""Every network with the prior through torch.compile's inductor on the CPU: the same results and gradients?

python tests/studies/compiled.py [NAME …]     # a Markdown table; a C++ compiler is needed, a minute or two a network

Small settings, one image of 64×64 px, forward and backward, fullgraph: a break of the graph is an error.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tests.model.models import RANDOM, SMALL, deblurrer


def off(name: str) -> tuple[float, float, float]:
    """(largest error of the output relative to its largest value, the same of the gradients, seconds to compile)."""
    settings = {
        "backbone": {"name": name, **SMALL.get(name, {})},
        "teacher": RANDOM,
        "student": {"name": "light", "width": 8},
        "spe": {"dim": 8, "groups": 2, "heads": 1},
    }
    network = deblurrer(**settings).eval()
    torch.manual_seed(0)
    for parameter in network.parameters():  # embeddings that say something
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.1)
        elif not parameter.any():  # what begins as the identity
            torch.nn.init.normal_(parameter, std=0.05)
    image = torch.rand(1, 3, 64, 64)
    compiled = torch.compile(network, fullgraph=True)
    outputs, gradients, started = [], [], time.perf_counter()
    for each in (compiled, network):
        network.zero_grad()
        restored = each(image).restored[-1]
        restored.square().mean().backward()
        outputs.append(restored.detach())
        grads = (p.grad if p.grad is not None else torch.zeros_like(p) for p in network.parameters())
        gradients.append(torch.cat([grad.flatten() for grad in grads]))
    seconds = time.perf_counter() - started
    errors = ((a - b).abs().max() / b.abs().max() for a, b in (outputs, gradients))
    return (*map(float, errors), seconds)


def main() -> None:
    print("| network | output | gradients | seconds |\n|---|---:|---:|---:|", flush=True)
    for name in sys.argv[1:] or sorted([*SMALL, "unet"]):
        try:
            output, gradient, seconds = off(name)
            print(f"| {name} | {output:.1e} | {gradient:.1e} | {seconds:.0f} |", flush=True)
        except Exception as error:  # each network's reason is the result here
            print(f"| {name} | {' '.join(str(error).split())[:300]} | | |", flush=True)


if __name__ == "__main__":
    main()
