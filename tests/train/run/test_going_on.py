"""Going on with a run: longer, without validation, beside damaged small files, with another teacher, on a full disk."""

import json
import os
import shutil
import subprocess

import pytest

from tests.train.weights import assert_same_weights
from train.checkpoint.manifest import digest

pytestmark = pytest.mark.slow
LONG = {"train__steps": 12, "train__distill_steps": 4, "checkpoint__every": 6}


@pytest.fixture
def copied(runs, unbroken):
    """A copy of the finished run whose last checkpoint is gone: it stands at step 6 of 12."""

    def copy(name: str, *, whole: bool = False):
        folder = runs.folder(name)
        shutil.copytree(runs.folder(unbroken), folder)
        if not whole:
            shutil.rmtree(folder / "checkpoints/step-00000012")
        return folder

    return copy


def test_stray_bytes_in_small_files_do_not_stop_a_run(runs, unbroken, copied):
    folder = copied("strays")
    for name in ("latest", "best"):
        (folder / "checkpoints" / name).write_bytes(b"\xff\xfe../../etc")
    (folder / "yardsticks.json").write_bytes(b"\xff{")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[4:5] = [b"\xff" + lines[4], b"5\n", b"[]\n"]  # a record damaged, and lines that are none
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    out, _ = runs.run("strays", "--resume", "auto", **LONG)
    assert "1 of 6 records up to step 6 are gone or damaged" in " ".join(out.split())
    after = {step: loss for step, loss in runs.losses("strays").items() if step > 6}
    assert after == {step: loss for step, loss in runs.losses(unbroken).items() if step > 6}
    assert (folder / "checkpoints/latest").read_text() == "step-00000012\n"
    last, expected = (runs.records(name)[-1] for name in ("strays", unbroken))
    assert last["tiers"] == expected["tiers"]  # with yardsticks that were chosen anew
    assert "yardsticks.json: not the yardsticks of a run" in " ".join(out.split())


def test_a_finished_run_goes_on_longer_and_says_what_its_schedule_does(runs, unbroken, copied):
    copied("longer", whole=True)
    out, _ = runs.run("longer", "--resume", "auto", "--extend", "15", **LONG)
    out = " ".join(out.split())
    assert "at step 12 of 15" in out
    assert "extended: learning rate 2.00e-05 here by the old schedule, " in out
    losses = runs.losses("longer")
    assert list(losses) == list(range(1, 16))
    assert {n: losses[n] for n in range(1, 13)} == runs.losses(unbroken)
    out, _ = runs.run("longer", "--resume", "auto", "--extend", "15", **LONG)  # as a job that is queued again does
    assert "is finished: nothing to do" in " ".join(out.split())
    _, error = runs.run("longer", "--resume", "auto", "--extend", "13", status=1, **LONG)
    assert "the run has 15 steps already: give more" in error
    _, error = runs.run("longer", "--resume", "auto", "--extend", "16", status=1, blur__preset="severe", **LONG)
    assert "go on with --set blur.preset=camera" in error
    _, error = runs.run("longer", "--extend", "15", status=1, **LONG)
    assert "--extend goes on with a run" in error
    _, error = runs.run("longer", "--resume", "auto", status=1, optim__lr=1e-3, **LONG)
    assert "go on for more steps with --extend" in error


def test_a_run_without_validation(runs):
    settings = {"train__steps": 3, "checkpoint__every": 2}
    out, _ = runs.run("unscored", eval="off", data__val="/nowhere", **settings)
    assert "no validation: eval is off" in out
    folder = runs.folder("unscored")
    assert not any("tiers" in record for record in runs.records("unscored"))
    assert (folder / "curve.png").exists()
    assert not (folder / "report.md").exists()
    shutil.rmtree(folder / "checkpoints/step-00000003")
    runs.run("unscored", "--resume", "auto", **settings)  # validation may begin later
    assert "tiers" in runs.records("unscored")[-1]


def test_another_teacher_s_weights_are_another_run(runs, copied):
    folder = copied("teacher")
    state = folder / "checkpoints/step-00000006/run.json"
    facts = json.loads(state.read_text())
    assert len(facts["teacher_digest"]) == 32
    manifest = folder / "checkpoints/step-00000006/manifest.json"
    for change, status, words in (
        ({"versions": facts["versions"] | {"torch": "1.0"}}, 0, "computed by other versions from here on: torch 1.0 →"),
        ({"teacher_digest": "0" * 32}, 1, "the teacher's weights are not those that this run began with"),
    ):
        state.write_text(json.dumps(facts | change))
        entries = json.loads(manifest.read_text())
        entries["run.json"] = {"bytes": state.stat().st_size, "blake2b": digest(state)}
        manifest.write_text(json.dumps(entries))
        shutil.rmtree(folder / "checkpoints/step-00000012", ignore_errors=True)
        out, error = runs.run("teacher", "--resume", "auto", status=status, **LONG)
        assert words in " ".join((out + error).split())


def test_what_a_resume_set_aside_goes_when_the_run_ends_and_random_states_are_exact(runs, unbroken, copied):
    folder = copied("aside", whole=True)
    path = folder / "checkpoints/step-00000006"
    runs.run("aside", "--resume", str(path), **LONG)
    names = sorted(entry.name for entry in (folder / "checkpoints").iterdir())
    assert names == ["best", "latest", "step-00000006", "step-00000012"]
    assert_same_weights(runs, "aside", unbroken, 12, tolerance=0)
    states = [runs.folder(n) / "checkpoints/step-00000012/rng-rank0.pt" for n in ("aside", unbroken)]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_a_checkpoint_that_is_not_there_is_told_as_such(runs, unbroken):
    _, error = runs.run("absent", "--resume", "/nowhere/step-00000005", status=1, **LONG)
    assert "--resume /nowhere/step-00000005: no such checkpoint" in error


@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk of our own is mounted by root")
@pytest.mark.parametrize("free", [0, 40_000, 400_000])
def test_a_full_disk_is_one_line_wherever_it_is_met(runs, tmp_path, free):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        (disk / "filler").write_bytes(bytes((1 << 20) - free))
        _, error = runs.run("full", status=1, run__root=str(disk), train__steps=2, eval__at_start=False)
        assert "Traceback" not in error
        assert "free space" in error or "No space left" in error
        assert str(disk) in error or "where the run's folder lies" in error
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
