"""Ctrl-C and SIGTERM: at once while nothing can be lost, at the next step boundary while training."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Turns the signals into a flag once `training` is set; before that, and at a second Ctrl-C, they interrupt."""

    def __init__(self) -> None:
        self.asked = False
        self.training = False

    def install(self) -> None:
        """Take over the signals (main thread only), also where a launcher's shell had them ignored."""
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.training or (self.asked and number == signal.SIGINT):
            raise KeyboardInterrupt
        self.asked = True
