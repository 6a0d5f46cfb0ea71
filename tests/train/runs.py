"""Training runs as a user starts them: `train/main.py` in processes of its own, small enough for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.train.small_sets import small_set

ROOT = Path(__file__).parents[2]
TINY = {
    "run.seed": 3,
    "data.crop": 64,
    "data.workers": 1,
    "data.margin": 16,
    "data.boxes_per_photo": 4,
    "model.backbone": "{name: unet, width: 8, blocks: [1, 1]}",
    "model.levels": 3,
    "model.student.width": 16,
    "model.spe.dim": 16,
    "optim.warmup": 2,
    "optim.lr": 2e-3,
    "train.batch": 4,
    "train.ema": 0.9,
    "eval.crop": 64,
    "eval.every": 0,
    "eval.panels": 2,
    "engine.cpu_threads": 1,
    "checkpoint.keep": 3,
}


class Runs:
    """Starts runs in one folder on one small data set."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "tiny.yaml").write_text("{}\n")
        self.train = small_set(root / "train", "train", 5)
        self.val = small_set(root / "val", "val", 2)

    def command(self, name: str, *arguments: str, ranks: int = 1, **changes: object) -> list[str]:
        """The command line of a run called `name`; changes: configuration keys with `__` for dots."""
        values = {"run.root": self.root / "runs", "run.name": name, "data.train": self.train, "data.val": self.val}
        values |= TINY | {key.replace("__", "."): value for key, value in changes.items()}
        main = [str(ROOT / "train" / "main.py"), "--config", str(self.root / "tiny.yaml"), *arguments]
        for key, value in values.items():
            main += ["--set", f"{key}={value}"]
        if ranks == 1:
            return [sys.executable, *main]
        # --standalone picks a free port; the default one collides when tests run side by side.
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        return launcher + main

    def environment(self) -> dict[str, str]:
        """Of a run: no launcher's leftovers, one thread."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "SHARPPRIOR_"))}
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            kept.pop(key, None)
        return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def start(
        self, name: str, *arguments: str, ranks: int = 1, start_new_session: bool = False, **changes: object
    ) -> subprocess.Popen:
        """Start a run and return its process."""
        return subprocess.Popen(
            self.command(name, *arguments, ranks=ranks, **changes), start_new_session=start_new_session,
            cwd=ROOT, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, name: str, *arguments: str, ranks: int = 1, status: int = 0, **changes: object) -> tuple[str, str]:
        """Run to the end; (stdout, stderr). Fails where the exit status is another."""
        process = self.start(name, *arguments, ranks=ranks, **changes)
        out, error = process.communicate(timeout=240)
        assert process.returncode == status, f"status {process.returncode}\n{out[-3000:]}\n{error[-3000:]}"
        return out, error

    def folder(self, name: str) -> Path:
        """The folder of a run."""
        return self.root / "runs" / name

    def records(self, name: str) -> list[dict]:
        """All records of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder(name) / "metrics.jsonl").read_text().splitlines()]

    def losses(self, name: str) -> dict[int, float]:
        """Loss of every step."""
        return {record["step"]: record["loss"] for record in self.records(name) if "loss" in record}
