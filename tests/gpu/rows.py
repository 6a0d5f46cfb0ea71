"""What the GPU scripts share: rows written the moment they are there, a clock that ends them, and a timing."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


class Rows:
    """JSON lines in one file of $OUT (or the folder named), each flushed; and the seconds that are left."""

    def __init__(self, name: str, doc: str) -> None:
        parser = argparse.ArgumentParser(description=doc.splitlines()[0])
        parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
        parser.add_argument("--seconds", type=float, default=240.0, help="ends by itself after these")
        parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, to try the script")
        args = parser.parse_args()
        if not args.dry and not torch.cuda.is_available():
            sys.exit(f"{name}: no GPU here; --dry tries the script on the CPU")
        self.dry, self.device = args.dry, "cpu" if args.dry else "cuda"
        self.start, self.seconds = time.monotonic(), args.seconds
        self.out = args.out
        args.out.mkdir(parents=True, exist_ok=True)
        self.file = (args.out / f"{name}.jsonl").open("a")

    def left(self) -> float:
        """Seconds until the script must have ended."""
        return self.seconds - (time.monotonic() - self.start)

    def write(self, section: str, **values: object) -> None:
        line = json.dumps({"section": section, "at": round(time.monotonic() - self.start, 1)} | values, default=str)
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    def machine(self) -> None:
        facts = {"torch": torch.__version__, "cpus": os.cpu_count(), "dry": self.dry}
        if not self.dry:
            import triton

            facts |= {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__, "cuda": torch.version.cuda}
        self.write("machine", **facts)


def process(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    """(exit status, output) of a process of ours in the project's root; 124 where the time was up."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | environment
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=max(1.0, seconds)
        )
    except subprocess.TimeoutExpired:
        return 124, "the time was up"
    return done.returncode, done.stdout + done.stderr


def measured(run: Callable[[], object], device: str, repeats: int = 20) -> dict[str, float]:
    """wall: median ms of a call with nothing else queued; on a GPU also its kernels' times and their number."""
    for _ in range(3):
        run()
    walls = []
    for _ in range(repeats if device == "cuda" else 2):
        _wait(device)
        begun = time.perf_counter()
        run()
        _wait(device)
        walls.append(1e3 * (time.perf_counter() - begun))
    row = {"wall_ms": round(sorted(walls)[len(walls) // 2], 4)}
    if device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(5):
                run()
            _wait(device)
        kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        row |= {"gpu_ms": round(sum(e.device_time for e in kernels) / 5e3, 4), "launches": len(kernels) / 5}
    return row


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
