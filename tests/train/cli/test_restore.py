"""`sharpprior restore` with a small exported model."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train.cli.conftest import photo
from tests.train.restore.test_video import film

ROOT = Path(__file__).parents[3]
MAIN = "import sharpprior; sharpprior.main()"


def command(*arguments: object, **more) -> subprocess.CompletedProcess:
    """The command as a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, "-c", MAIN, *map(str, arguments)]
    return subprocess.run(whole, env=environment, capture_output=True, timeout=120, **more)


def test_the_old_form_and_the_new_give_the_same(model, sharpprior, tmp_path):
    photo(tmp_path / "a.png")
    assert sharpprior("restore", model, tmp_path / "a.png", "-o", tmp_path / "old.png")[0] == 0
    status, text, _ = sharpprior("restore", tmp_path / "a.png", "--model", model)
    assert (status, "1 restored" in text) == (0, True)
    old, new = (np.asarray(Image.open(tmp_path / name)) for name in ("old.png", "a_restored.png"))
    np.testing.assert_array_equal(old, new)
    assert not np.array_equal(old, np.asarray(Image.open(tmp_path / "a.png")))


def test_strength_tiles_and_an_ensemble_are_used(model, sharpprior, tmp_path):
    source = photo(tmp_path / "a.png", (200, 150))
    results = {}
    ways = {
        "plain": [],
        "none": ["--strength", 0],
        "half": ["--strength", 0.5],
        "mean": ["--ensemble"],
        "bf16": ["--precision", "bf16"],
    }
    for name, options in ways.items():
        out = tmp_path / f"{name}.png"
        assert sharpprior("restore", source, "--model", model, "-o", out, *options)[0] == 0
        results[name] = np.asarray(Image.open(out)).astype(int)
    before = np.asarray(Image.open(source)).astype(int)
    np.testing.assert_array_equal(results["none"], before)
    assert np.abs(results["half"] - (before + results["plain"]) / 2).max() <= 1
    for name in ("mean", "bf16"):
        assert np.abs(results[name] - results["plain"]).max() > 0


def test_json_lines_tell_of_every_file(model, sharpprior, tmp_path):
    photo(tmp_path / "in" / "a.png")
    photo(tmp_path / "in" / "x" / "b.png")
    (tmp_path / "in" / "c.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "in" / "d.gif").write_bytes(b"GIF89a")
    status, text, error = sharpprior("restore", tmp_path / "in", "--model", model, "-o", tmp_path / "out", "--json")
    assert status == 1
    assert "2 restored, 0 there already, 1 failed, 1 skipped" in error
    lines = {Path(each["source"]).name: each for each in map(json.loads, text.splitlines())}
    assert {name: each["status"] for name, each in lines.items()} == {
        "a.png": "restored", "b.png": "restored", "c.jpg": "failed", "d.gif": "skipped",
    }  # fmt: skip
    assert lines["b.png"]["target"] == str(tmp_path / "out" / "x" / "b.png")
    assert (lines["a.png"]["width"], lines["a.png"]["height"]) == (70, 50)
    assert lines["a.png"]["seconds"] > 0
    assert "c.jpg" in lines["c.jpg"]["problem"]


def test_a_pipe_carries_pictures_and_nothing_else(model, tmp_path):
    source = photo(tmp_path / "a.jpg")
    done = command("restore", "-", "--model", model, input=source.read_bytes())
    assert done.returncode == 0, done.stderr
    with Image.open(io.BytesIO(done.stdout)) as image:
        assert (image.format, image.size) == ("JPEG", (70, 50))
    assert b"1 restored" in done.stderr


def test_lines_of_json_are_not_put_behind_a_picture(model, sharpprior, tmp_path):
    source = photo(tmp_path / "a.png")
    for arguments in (["-"], [source, "-o", "-"]):
        status, text, error = sharpprior("restore", *arguments, "--model", model, "--json")
        assert (status, text) == (1, "")
        assert "give -o FILE" in error


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_names_that_are_no_text_are_told_as_they_can_be(model, tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    names = [os.fsdecode(b"\xff\xfe.png"), "\u00e9.png"]
    for name in names:
        photo(tmp_path / "in" / name)
        (tmp_path / "in" / name.replace("png", "jpg")).write_bytes(b"nothing")
    arguments = ("restore", tmp_path / "in", "--model", model, "-o")
    done = command(*arguments, tmp_path / "json", "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(Path(line["source"]).name for line in lines if line["status"] == "restored") == sorted(names)
    assert len(lines) == 4
    done = command(*arguments, tmp_path / "text")
    assert sorted(os.listdir(tmp_path / "text")) == sorted(names)
    assert b"2 restored" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_pipe_into_a_file_and_an_empty_one(model, sharpprior, tmp_path, monkeypatch):
    data = photo(tmp_path / "a.jpg").read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert sharpprior("restore", "-", "--model", model, "-o", tmp_path / "b.png")[0] == 0
    assert Image.open(tmp_path / "b.png").size == (70, 50)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    status, text, error = sharpprior("restore", "-", "--model", model)
    assert (status, text) == (1, "")
    assert "standard input: the file is empty" in error


def test_work_is_divided_among_ranks(model, sharpprior, tmp_path, monkeypatch):
    for number in range(5):
        photo(tmp_path / "in" / f"{number}.png")
    arguments = ("restore", tmp_path / "in", "--model", model, "-o", tmp_path / "out")
    assert sharpprior(*arguments, "--rank", 1, "--world", 2)[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1.png", "3.png"]
    for key, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr("os._exit", sys.exit)  # beside other ranks a command leaves without waiting for them
    status, text, _ = sharpprior(*arguments)
    assert (status, len(list((tmp_path / "out").iterdir()))) == (0, 5)
    assert "3 restored" in text


def test_a_folder_with_a_video(model, sharpprior, tmp_path):
    photo(tmp_path / "in" / "a.png")
    film(tmp_path / "in" / "clip.mp4", count=5)
    status, text, _ = sharpprior("restore", tmp_path / "in", "--model", model, "-o", tmp_path / "out", "--json")
    assert status == 0
    assert [json.loads(line)["status"] for line in text.splitlines()] == ["restored", "restored"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "clip.mp4"]


def test_a_disk_that_is_full_half_way_leaves_nothing_half_written(model, tmp_path):
    """A limit on the size of files stands for the full disk: the same call fails, half-way too."""
    photo(tmp_path / "in" / "a.png", (40, 40))
    photo(tmp_path / "in" / "b.png", (200, 200))
    photo(tmp_path / "in" / "c.png", (40, 40))
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); " + MAIN
    whole = [sys.executable, "-c", limited, "restore", tmp_path / "in", "--model", model, "-o", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, whole)), env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "b.png: cannot be written: File too large" in done.stdout
    assert "2 restored, 0 there already, 1 failed" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strength", 2], "strength 2.0"),
        (["--tile", 8], "--tile 8"),
        (["--precision", "fp8"], "fp32, bf16, fp16"),
        (["--rank", 0], "give both"),
        (["--rank", 2, "--world", 2], "from 0 to 1"),
        (["--overwrite", "--skip-existing"], "exclude each other"),
        (["--max-megapixels", 0.001], "more than 0.001 megapixels"),
    ],
)
def test_mistakes_are_one_line(model, sharpprior, tmp_path, options, words):
    source = photo(tmp_path / "a.png")
    status, _, error = sharpprior("restore", source, "--model", model, *options)
    assert status == 1
    assert len(error.strip().splitlines()) == 1
    assert words in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_without_a_model_it_is_said_which_to_name(sharpprior, tmp_path, monkeypatch):
    monkeypatch.setattr("train.restore.names.SHIPPED", tmp_path / "absent.safetensors")
    status, _, error = sharpprior("restore", photo(tmp_path / "a.png"))
    assert status == 1
    assert "--model" in error
