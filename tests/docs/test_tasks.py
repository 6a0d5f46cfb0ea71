"""Every block of the pages in docs/tasks is run as it stands: commands in order, and files and rows put in place."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch

from model.deblurrer import build_backbone
from train import ROOT

pytestmark = pytest.mark.slow
PAGES = sorted((ROOT / "docs" / "tasks").glob("*.md"))
# They need data sets, and a cluster: tests/train/cli/test_evaluate.py and tests/slurm/test_page.py run them.
ELSEWHERE = ("evaluate", "cluster")
HERE = [page for page in PAGES if page.stem not in ELSEWHERE]
PARTS = ("train", "data", "model", "kernels", "configs", "tests", "docs", "sharpprior.py", "pyproject.toml")
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    language: str
    where: dict[str, str]
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, with the `key=value` words behind their language."""
    found = []
    for language, words, text in FENCE.findall(page.read_text(encoding="utf-8")):
        pairs = re.findall(r'(\w+)=(?:"([^"]*)"|(\S+))', words)
        found.append(Block(language, {key: quoted or bare for key, quoted, bare in pairs}, text))
    return found


def picture(seed: int, size: tuple[int, int]) -> np.ndarray:
    small = np.random.Generator(np.random.Philox(seed)).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return cv2.resize(small, size, interpolation=cv2.INTER_CUBIC)


def copied(folder: Path) -> Path:
    """A copy of the checkout in a new folder, with the pictures and files that the pages name."""
    folder.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / part)
    for seed, part in enumerate(["train"] * 4 + ["val"] * 2):
        (folder / "my_photos" / part).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / "my_photos" / part / f"{seed}.jpg"), picture(seed, (340, 300)))
    cv2.imwrite(str(folder / "blurry.jpg"), picture(9, (96, 64)))
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copied(tmp_path / "checkout")


def environment(folder: Path, tools: Path) -> dict[str, str]:
    tools.mkdir()
    launcher = tools / "accelerate"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.docs.launcher "$@"\n')
    launcher.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "SHARPPRIOR_"))}
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), kept["PATH"]])
    return kept | {"PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.mark.parametrize("page", HERE, ids=[page.stem for page in HERE])
def test_every_command_of_a_page_works(page, checkout, tmp_path):
    found = blocks(page)
    if any("NAFNet-GoPro-width32.pth" in block.text for block in found):
        torch.save({"params": build_backbone("nafnet-32").state_dict()}, checkout / "NAFNet-GoPro-width32.pth")
    commands = []
    for block in found:
        if block.language == "sh":
            commands.append(block.text)
        elif "file" in block.where:
            (checkout / block.where["file"]).write_text(block.text)
        else:
            file = checkout / block.where["insert"]
            lines = file.read_text().splitlines(keepends=True)
            place = next(n for n, line in enumerate(lines) if line.startswith(block.where["after"]))
            file.write_text("".join([*lines[: place + 1], block.text, *lines[place + 1 :]]))
    assert commands
    script = "set -eux\n" + "\n".join(commands)
    done = subprocess.run(
        ["bash", "-c", script], cwd=checkout, env=environment(checkout, tmp_path / "tools"),
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_every_page_names_files_that_are_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).resolve().exists(), f"{page.name}: {target}"
