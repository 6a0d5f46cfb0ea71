"""Pictures that tests of data/ make up."""

import numpy as np

from data.stream.order import derived_rng


def picture(number: int, height: int = 64, width: int = 64) -> np.ndarray:
    """A textured RGB uint8 picture that no other number gives."""
    rng = derived_rng("test picture", number)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width]
