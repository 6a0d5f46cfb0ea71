"""The points where a backbone lets a prior in."""

from collections.abc import Callable

import torch

Embed = Callable[[str, torch.Tensor], torch.Tensor]


def identity(name: str, feature: torch.Tensor) -> torch.Tensor:
    """Embed nothing: what a backbone calls at its points when it stands alone."""
    return feature
