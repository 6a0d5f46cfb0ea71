"""train/main.py with the CPU's stand-in for CUDA graphs: graphed_run.py, then main.py's arguments."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from tests.train.rerun import RerunRecorder
    from train.engine.capture import RECORDERS

    RECORDERS["cpu"] = RerunRecorder
    sys.argv = [str(ROOT / "train" / "main.py"), *sys.argv[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
