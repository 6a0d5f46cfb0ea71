"""docs/tasks/cluster.md on a real SLURM: its commands as they stand, in a copy of the checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_tasks import blocks, copied
from tests.train.evaluate.trees import pairs_tree

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = re.compile(r'^\{"step": (\d+), "loss"', re.M)


def test_every_command_of_the_page_works(cluster, tmp_path):
    folder = copied(tmp_path / "checkout")
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    pairs_tree(folder / "my_pairs", 3)
    commands = [block.text for block in blocks(ROOT / "docs" / "tasks" / "cluster.md")]
    assert len(commands) == 4
    tools = Path(sys.executable).parent
    environment = cluster.environment() | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment["PATH"] = os.pathsep.join([str(tools), environment["PATH"]])
    done = subprocess.run(
        ["bash", "-c", "set -eux\n" + "\n".join(commands)], cwd=folder, env=environment,
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    said = "\n".join(path.read_text() for path in sorted(folder.glob("slurm-*.out")))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:] + said + cluster.tail()
    run = folder / "runs" / "first"
    assert [int(step) for step in STEPS.findall((run / "metrics.jsonl").read_text())] == [1, 2, 3, 4, 5, 6]
    assert "2 ranks on cpu" in (run / "log.txt").read_text()
    assert {path.name for path in (folder / "restored").rglob("*.*")} == {"4.jpg", "5.jpg"}
    assert (folder / "results" / "mine" / "results.json").is_file()
