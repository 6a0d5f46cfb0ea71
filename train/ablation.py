"""`python -m train.ablation`: the comparison of ways to distill, which lives in `train/experiments/ablation.py`."""

import sys

from train.experiments.ablation import main
from train.watch.failure import explained

if __name__ == "__main__":
    sys.exit(explained(lambda: main(sys.argv[1:])))
