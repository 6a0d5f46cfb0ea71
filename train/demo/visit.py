"""What the demo keeps for one visitor, and for how long."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.demo.photo import Photo


@dataclass
class Visit:
    """A folder of the visitor's own, the photograph that was restored last, and its sharp original where that is known
    (of the examples)."""

    folder: Path
    photo: Photo | None = None
    truth: np.ndarray | None = None

    @classmethod
    def begin(cls, root: Path) -> Visit:
        """A visit with an empty folder below `root`, which nobody else can read."""
        return cls(Path(tempfile.mkdtemp(dir=root, prefix="visit-")))

    def end(self) -> None:
        """Delete what is kept."""
        self.photo = self.truth = None
        shutil.rmtree(self.folder, ignore_errors=True)
