"""A network more is one file and one line: shown on a copy of the product, trained by the command that users start."""

import shutil
import subprocess

import pytest
from safetensors import safe_open

from tests.train.runs import ROOT, Runs

pytestmark = pytest.mark.slow
NINTH = '''
"""A plain network with one embed point."""

from torch import nn

from model.backbones.points import identity


class Ninth(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, 12, 3, 1, 1)
        self.shuffle = nn.PixelShuffle(2)
        self.stride_multiple, self.embed_points = 2, {"middle": (width, 2)}

    def forward(self, x, embed=identity):
        return (x + self.shuffle(self.leave(embed("middle", self.enter(x)).relu())),)
'''


@pytest.fixture
def product(tmp_path):
    """The four packages with one file and one line more."""
    for package in ("data", "kernels", "model", "train"):
        ignored = shutil.ignore_patterns("samples", "__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    backbones = tmp_path / "model" / "backbones"
    (backbones / "ninth.py").write_text(NINTH)
    table = backbones / "__init__.py"
    row = 'from model.backbones.ninth import Ninth\n\nBACKBONES = {\n    "ninth": Ninth,'
    table.write_text(table.read_text().replace("BACKBONES = {", row))
    return tmp_path


def test_one_file_and_one_line_make_a_network_that_trains_with_the_prior(product):
    runs = Runs(product)
    backbone = {"model__backbone": "{name: ninth, width: 12}", "train__steps": 3}
    command = runs.command("ninth", eval__at_start=False, eval__per_tier=1, **backbone)
    command = [str(product / "train" / "main.py") if part.endswith("main.py") else part for part in command]
    environment = {key: value for key, value in runs.environment().items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=product, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(runs.losses("ninth")) == [1, 2, 3]
    weights = runs.folder("ninth") / "checkpoints" / "step-00000003" / "model.safetensors"
    with safe_open(weights, framework="pt") as file:
        assert {"backbone.enter.weight", "spe.middle.attend.scale"} <= set(file.keys())
