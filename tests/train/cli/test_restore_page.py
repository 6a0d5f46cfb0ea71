"""Every command of docs/RESTORE.md works as it stands there."""

import shlex
from pathlib import Path

import pytest

from model.pretrained import load_config, load_state, save_pretrained
from tests.train.cli.conftest import photo
from tests.train.restore.test_video import film

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[3] / "docs" / "RESTORE.md"


def test_the_pages_commands_work_one_after_the_other(model, sharpprior, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pretrained(tmp_path / "runs" / "quickstart", load_state(model), load_config(model))
    photo(tmp_path / "photo.jpg")
    photo(tmp_path / "holiday" / "a.jpg")
    photo(tmp_path / "holiday" / "x" / "b.png")
    film(tmp_path / "clip.mp4", count=3)
    commands = [line.strip() for line in PAGE.read_text().splitlines() if line.startswith("    sharpprior ")]
    assert len(commands) >= 11
    for command in commands:
        _, *arguments = shlex.split(command, comments=True)
        status, _, error = sharpprior(*arguments)
        assert status == 0, f"{command}: {error}"
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert found >= {
        "photo_restored.jpg", "sharp.png", "sharp2.png", "sharp/a.jpg", "sharp/x/b.png", "sharp3/a_s.jpg",
        "clip_restored.mp4", "model.safetensors", "model.pt2", "model.onnx", "for_spandrel.safetensors",
    }  # fmt: skip
