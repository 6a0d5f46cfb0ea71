"""Training, evaluation and restoration: everything that uses `data`, `model` and `kernels` together.

Another distribution may install packages called `kernels`, `data` or `model` (model hubs do install `kernels`), so
this checkout goes to the front of the import path before anything of ours is imported.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def checkout_first() -> None:
    """Put the checkout first in `sys.path`, and take the folder of this package out of it (`train/main.py` run as a
    script puts it there, where `train/config` and `train/run` would shadow other people's modules)."""
    unwanted = {str(ROOT), str(ROOT / "train")}
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry not in unwanted)]


checkout_first()
