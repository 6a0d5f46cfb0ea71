"""A switch between the training process and its loader workers: whether batches still get cached features attached."""

from __future__ import annotations

import torch

from data.feature_cache import FeatureReader


class SwitchedAttach:
    """A loader's `attach` that looks features up while it is on. Picklable: workers and the process that made it share
    the switch, so that a cache that does not pay is not read any more."""

    def __init__(self, reader: FeatureReader) -> None:
        self.reader = reader
        self._on = torch.ones(1, dtype=torch.uint8).share_memory_()

    @property
    def on(self) -> bool:
        """Whether features are looked up."""
        return bool(self._on)

    def turn_off(self) -> None:
        """No more look-ups, in any process; batches that are on their way still carry theirs."""
        self._on.zero_()

    def __call__(self, batch: dict) -> None:
        if self.on:
            self.reader.attach(batch)
