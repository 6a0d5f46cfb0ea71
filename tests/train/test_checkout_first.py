"""Other distributions may be called as our packages are: ours are used all the same, in loader workers too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "data" / "samples"


def test_a_run_uses_this_checkout_beside_other_packages_of_the_same_names(runs, tmp_path):
    for name in ("kernels", "model", "data", "train"):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('another distribution was imported')\n")
    command = runs.command("first", train__steps=1, eval__per_tier=1)
    environment = runs.environment() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_console_command_uses_this_checkouts_kernels(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise RuntimeError('another distribution was imported')\n")
    code = f"import sys; sys.path.append({str(ROOT)!r}); import train.cli, model.spe, kernels; print(kernels.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py"), done.stderr


@pytest.mark.parametrize("name", ["train", "data", "model", "kernels"])
def test_the_command_survives_other_packages_of_its_parts_names(tmp_path, name):
    foreign = tmp_path / name
    foreign.mkdir()
    (foreign / "__init__.py").write_text("raise ImportError('not ours')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    code = "import sys, sharpprior; sys.argv = ['sharpprior', *sys.argv[1:]]; sharpprior.main()"
    command = [sys.executable, "-P", "-c", code, "stats", "--pairs", "1", "--crop", "64", str(BUNDLED / "val")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "13 samples" in done.stdout
