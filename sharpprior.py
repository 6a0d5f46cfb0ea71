"""The `sharpprior` command's entry and what Python programs import of it, under a name that is nobody else's.

    from sharpprior import Restorer
    sharp = Restorer.load("runs/quickstart")(blurry)

`train`, `data`, `model` and `kernels` are names that other people's packages have too, first on PYTHONPATH perhaps: so
the folder of these comes first before one of them is imported.
"""

import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the command."""
    _our_folder_first()
    from train.cli import main as run

    run()


def __getattr__(name: str) -> Any:
    """`Restorer`, when it is asked for: the command itself answers `--help` without torch."""
    if name != "Restorer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _our_folder_first()
    from train.restore.restorer import Restorer

    return Restorer


def _our_folder_first() -> None:
    root = str(Path(__file__).resolve().parent)
    sys.path[:] = [root, *(entry for entry in sys.path if entry != root)]
