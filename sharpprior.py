"""The `sharpprior` command's entry, under a name that is nobody else's.

`train`, `data`, `model` and `kernels` are names that other people's packages have too, first on PYTHONPATH perhaps: so
the folder of these comes first before one of them is imported.
"""

import sys
from pathlib import Path


def main() -> None:
    """Run the command."""
    root = str(Path(__file__).resolve().parent)
    sys.path[:] = [root, *(entry for entry in sys.path if entry != root)]
    from train.cli import main as run

    run()
