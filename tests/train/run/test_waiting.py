"""Parameters that wait while the student distills are new to Adam when their turn comes, under every ZeRO stage."""

import json

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
SETTINGS = {
    "train__steps": 6,
    "train__distill_steps": 3,
    "checkpoint__every": 1,
    "checkpoint__keep": 9,
    "train__ema": 0.0,
    "optim__warmup": 0,
    "optim__final_lr": 1.0,
    "optim__weight_decay": 0.0,
    "optim__clip": 0.0,
    "eval__at_start": False,
    "eval__per_tier": 1,
}


def model(runs, name: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(runs.folder(name) / f"checkpoints/step-{step:08d}/model.safetensors")


@pytest.mark.parametrize(
    ("zero", "ranks", "betas"), [(0, 1, "[0.9, 0.9]"), (2, 2, "[0.9, 0.999]"), (3, 1, "[0.9, 0.9]")]
)
def test_the_first_update_of_the_restorer_is_a_first_update(runs, zero, ranks, betas):
    name = f"waiting{zero}"
    runs.run(name, ranks=ranks, engine__zero=zero, optim__betas=betas, **SETTINGS)
    before, after = model(runs, name, 3), model(runs, name, 4)
    moved = torch.cat([(after[n] - before[n]).abs().flatten() for n in before if not n.startswith("prior.")])
    moved = moved[moved > 0]
    # Adam's first update is lr·g/|g|, whatever its β: but for gradients near ε.
    assert float(moved.median()) == pytest.approx(2e-3, rel=0.02)
    assert float(moved.max()) <= 2e-3 * 1.02
    assert all(torch.equal(model(runs, name, 1)[n], before[n]) for n in before if not n.startswith("prior."))
    whole = model(runs, name, 6)
    (runs.folder(name) / "checkpoints/step-00000006").rename(runs.root / f"{name}-6")
    for step in (5, 4):  # what is left was saved just before the restorer's first step
        (runs.folder(name) / f"checkpoints/step-{step:08d}").rename(runs.root / f"{name}-{step}")
    runs.run(name, "--resume", "auto", ranks=ranks, engine__zero=zero, optim__betas=betas, **SETTINGS)
    again = model(runs, name, 6)
    assert all(torch.equal(again[n], whole[n]) for n in whole)
    counts = {}
    for path in sorted((runs.folder(name) / "checkpoints/step-00000006/state").glob("*.safetensors")):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            counts |= json.loads(json.loads(file.read(size))["__metadata__"]["updates"])
    assert {count for n, count in counts.items() if n.startswith("prior.")} == {6}
    assert {count for n, count in counts.items() if not n.startswith("prior.")} == {3}
