"""What a user can get wrong: one line that names the thing and the way out, a status other than 0, nothing lost."""

import json
import shutil

import pytest

pytestmark = pytest.mark.slow


def one_line(error: str) -> str:
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def test_unknown_key(runs):
    _, error = runs.run("bad", status=1, optim__lrr=1)
    assert "did you mean lr?" in one_line(error)


def test_a_run_that_exists_is_not_touched(runs, unbroken):
    before = {path: path.stat().st_mtime_ns for path in runs.folder(unbroken).rglob("*")}
    _, error = runs.run(unbroken, status=1)
    assert "this run exists" in one_line(error)
    assert "--resume auto" in one_line(error)
    assert {path: path.stat().st_mtime_ns for path in runs.folder(unbroken).rglob("*")} == before


def test_resuming_with_another_configuration_is_refused(runs, unbroken):
    _, error = runs.run(unbroken, "--resume", "auto", status=1, train__steps=12, train__distill_steps=3)
    assert "train.distill_steps 4 → 3" in one_line(error)


def test_missing_and_torn_shards_are_named(runs, tmp_path):
    _, error = runs.run("bad1", status=1, data__train=tmp_path / "nowhere")
    assert "nowhere: no such data" in one_line(error)
    torn = tmp_path / "torn"
    shutil.copytree(runs.train, torn)
    shard = sorted(torn.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-5000])
    _, error = runs.run("bad2", status=1, data__train=torn)
    assert f"{shard}: torn shard" in one_line(error)


def test_a_flipped_byte_stops_the_run_at_its_sample(runs, tmp_path):
    bad = tmp_path / "flipped"
    shutil.copytree(runs.train, bad)
    index = json.loads((bad / "index.json").read_text())
    shard = index["shards"][0]
    content = bytearray((bad / shard["name"]).read_bytes())
    content[shard["members"]["jpg"][0][0] + 1000] ^= 255
    (bad / shard["name"]).write_bytes(bytes(content))
    _, error = runs.run("bad3", status=1, data__train=bad, train__steps=5, data__workers=2)
    assert f"sample {shard['keys'][0]}" in one_line(error)


def test_a_crop_larger_than_the_photographs(runs):
    _, error = runs.run("bad4", status=1, data__crop=640)
    assert "smaller than the crop of 640 px" in one_line(error)


def test_teacher_weights_that_are_not_there(runs, tmp_path):
    _, error = runs.run("bad5", status=1, model__teacher__weights=tmp_path / "absent.safetensors")
    assert "absent.safetensors" in one_line(error)


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_a_run_folder_that_cannot_be(runs, tmp_path, kind):
    (tmp_path / "file").write_text("")
    root, name = (tmp_path, "file") if kind == "file" else (tmp_path / "file", "run")
    _, error = runs.run("bad6", status=1, run__root=root, run__name=name)
    assert "file" in one_line(error)
    assert (tmp_path / "file").read_text() == ""


def test_a_diverging_run_stops_and_says_so(runs):
    settings = {"train__steps": 30, "optim__lr": "1e30", "optim__clip": 0, "optim__warmup": 0, "checkpoint__every": 1}
    _, error = runs.run("diverged", status=1, **settings)
    assert "optim.lr" in one_line(error)
    assert "--init" in one_line(error)


def test_a_corrected_command_runs_after_an_early_mistake(runs, tmp_path):
    _, error = runs.run("early", status=1, data__val=tmp_path / "nowhere")
    assert "nowhere" in one_line(error)
    _, error = runs.run("early", status=1, data__crop=640)
    assert "640" in one_line(error)  # not: this run exists


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model__prior": "false", "train__distill_steps": 1}, "model.prior is false"),
        ({"loss__structure": 0, "loss__context": 0, "train__distill_steps": 1}, "nothing to learn"),
        ({"engine__deepspeed": "{zero_optimization: 1}"}, "expected settings"),
        ({"run__name": "1e5"}, "quotes"),
    ],
)
def test_settings_that_contradict_each_other(runs, settings, words):
    _, error = runs.run("contradiction", status=1, **settings)
    assert words in one_line(error)


def test_options_that_would_be_ignored_are_refused(runs):
    assert "dry-run" in one_line(runs.run("ignored", "--ranks", "2", status=1)[1])
    assert "leave out" in one_line(runs.run("ignored", "--dry-run", "--resume", "auto", status=1)[1])
    assert "at least 1" in one_line(runs.run("ignored", "--dry-run", "--ranks", "0", status=1)[1])
