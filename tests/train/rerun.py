"""A stand-in for CUDA graphs on a CPU: a replay runs the function again and writes into the first run's tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from train.engine.capture import Captured


class RerunRecorder:
    """Counts what is captured and replayed. On a GPU a capture computes nothing; this one does, which is stricter
    about what must be put back."""

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008 (a constant)
        assert device.type == "cpu"
        self.captured = self.replayed = 0

    def side(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def capture(self, function: Callable[[], list[Tensor | None]]) -> Captured:
        kept = [None if tensor is None else tensor.detach().clone() for tensor in function()]
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            for place, value in zip(kept, function(), strict=True):
                if place is not None:
                    place.copy_(value)

        return Captured(kept, replay)

    def renew(self) -> None:
        pass
