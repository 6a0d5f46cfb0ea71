"""Comparison of what two runs saved."""

import torch
from safetensors.torch import load_file


def assert_same_weights(runs, one: str, two: str, step: int, tolerance: float) -> None:
    """Two runs' saved models agree to an absolute tolerance."""
    paths = [runs.folder(name) / f"checkpoints/step-{step:08d}/model.safetensors" for name in (one, two)]
    a, b = (load_file(path) for path in paths)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
