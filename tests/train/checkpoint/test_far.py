"""Copies of checkpoints elsewhere: whole or not at all, beside the training, whatever the other side does."""

import json
import logging
import shutil
import threading

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from train.checkpoint.copier import Copier
from train.checkpoint.far import FarFolder, far_folder
from train.checkpoint.folder import Checkpoints
from train.checkpoint.manifest import damage
from train.config.schema import Config


def make(checkpoints: Checkpoints, step: int):
    """A whole checkpoint of a few bytes."""
    from train.checkpoint.manifest import seal

    folder = checkpoints.path(step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "rank.bin").write_bytes(bytes([step % 256]) * 1000)
    (folder / "run.json").write_text(json.dumps({"step": step}))
    seal(folder)
    return folder


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    return Checkpoints(tmp_path / "run" / "checkpoints", 2)


@pytest.fixture
def said(monkeypatch):
    """Warnings of the program."""
    lines: list[str] = []
    log = logging.getLogger("sharpprior")
    monkeypatch.setattr(log, "warning", lambda text, *values: lines.append(text % values))
    return lines


class Unsteady(LocalFileSystem):
    """A local folder behind a line that can fail, and be held."""

    protocol = "unsteady"
    cachable = False
    failures = 0
    gate = threading.Event()

    def put_file(self, *args, **keywords):
        type(self).gate.wait(30)
        if type(self).failures > 0:
            type(self).failures -= 1
            raise ConnectionError("the line is cut")
        return super().put_file(*args, **keywords)


@pytest.fixture
def line(tmp_path):
    """URL of the unsteady file system, open and without failures."""
    fsspec.register_implementation("unsteady", Unsteady, clobber=True)
    Unsteady.failures = 0
    Unsteady.gate.set()
    return f"unsteady://{tmp_path}/far"


def test_a_checkpoint_is_copied_whole_with_the_metrics(checkpoints, tmp_path, said):
    copier = Copier(FarFolder(f"file://{tmp_path}/far", "run"), checkpoints)
    copier.submit(make(checkpoints, 5))
    copier.close(30)
    assert damage(tmp_path / "far/run/step-00000005") is None
    assert (tmp_path / "far/run/metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not said


def test_as_many_are_kept_there_and_the_best(checkpoints, tmp_path):
    far = FarFolder(f"file://{tmp_path}/far", "run")
    for step in (1, 2, 3, 4):
        make(checkpoints, step)
        (checkpoints.folder / "best").write_text("step-00000001\n")
        copier = Copier(far, checkpoints)
        copier.submit(checkpoints.path(step))
        copier.close(30)
    assert far.steps() == [1, 3, 4]


def test_a_copy_without_its_manifest_does_not_count_and_is_made_again(checkpoints, tmp_path):
    far = FarFolder(f"file://{tmp_path}/far", "run")
    far.copy(make(checkpoints, 1))
    far.copy(make(checkpoints, 2))
    (tmp_path / "far/run/step-00000002/manifest.json").unlink()
    (tmp_path / "far/run/step-00000002/state/rank.bin").write_bytes(b"half")
    elsewhere = Checkpoints(tmp_path / "other" / "checkpoints", 2)
    elsewhere.folder.mkdir(parents=True)
    assert far.fetch_newest(elsewhere) == elsewhere.path(1)
    far.copy(checkpoints.path(2))
    assert damage(tmp_path / "far/run/step-00000002") is None


def test_what_is_fetched_is_verified_and_an_older_one_taken_where_it_is_damaged(checkpoints, tmp_path, said):
    far = FarFolder(f"file://{tmp_path}/far", "run")
    for step in (1, 2):
        far.copy(make(checkpoints, step))
    victim = tmp_path / "far/run/step-00000002/state/rank.bin"
    victim.write_bytes(b"\x07" + victim.read_bytes()[1:])
    elsewhere = Checkpoints(tmp_path / "other" / "checkpoints", 2)
    elsewhere.folder.mkdir(parents=True)
    assert far.fetch_newest(elsewhere) == elsewhere.path(1)
    assert elsewhere.steps() == [1]
    assert "its content changed" in said[0]
    assert not list(elsewhere.folder.glob("*.tmp"))


@pytest.mark.parametrize("hurt", ["manifest", "manifest's names", "missing file"])
def test_a_damaged_copy_is_passed_over_and_told(checkpoints, tmp_path, said, hurt):
    far = FarFolder(f"file://{tmp_path}/far", "run")
    for step in (1, 2):
        far.copy(make(checkpoints, step))
    victim = tmp_path / "far/run/step-00000002"
    manifest = victim / "manifest.json"
    if hurt == "manifest":
        manifest.write_bytes(b"\xff" + manifest.read_bytes()[1:])
    elif hurt == "manifest's names":
        manifest.write_text(manifest.read_text().replace("state/rank.bin", "../../stray.bin"))
    else:
        (victim / "run.json").unlink()
    elsewhere = Checkpoints(tmp_path / "other" / "checkpoints", 2)
    elsewhere.folder.mkdir(parents=True)
    assert far.fetch_newest(elsewhere) == elsewhere.path(1)
    assert "did not arrive whole" in said[0]
    assert {path.name for path in elsewhere.folder.iterdir()} == {"step-00000001"}
    shutil.rmtree(tmp_path / "far/run/step-00000001")
    with pytest.raises(ValueError, match="no checkpoint arrived whole"):  # and not: nothing to resume
        far.fetch_newest(elsewhere)
    if hurt != "missing file":
        far.copy(checkpoints.path(2))
        assert damage(victim) is None


def test_the_best_one_is_copied_though_a_newer_one_took_its_turn_and_comes_back(checkpoints, tmp_path):
    far = FarFolder(f"file://{tmp_path}/far", "run")
    for step in (1, 2, 3, 4):
        make(checkpoints, step)
    (checkpoints.folder / "best").write_text("step-00000001\n")
    copier = Copier(far, checkpoints)
    copier.submit(checkpoints.path(4))
    copier.close(30)
    assert far.steps() == [1, 4]
    elsewhere = Checkpoints(tmp_path / "other" / "checkpoints", 2)
    elsewhere.folder.mkdir(parents=True)
    assert far.fetch_newest(elsewhere) == elsewhere.path(4)
    assert elsewhere.steps() == [1, 4]
    assert elsewhere.best() == elsewhere.path(1)
    assert damage(elsewhere.path(1)) is None


def test_copies_do_not_go_where_the_run_itself_lies(tmp_path):
    config = Config(run={"root": str(tmp_path), "name": "a"}, checkpoint={"copy_to": f"file://{tmp_path}"})
    with pytest.raises(ValueError, match=r"copy_to .* is where the run itself lies"):
        far_folder(config, fresh=True)


def test_a_failing_line_is_tried_again(checkpoints, line, tmp_path, said):
    Unsteady.failures = 3
    copier = Copier(FarFolder(line, "run"), checkpoints, backoff_s=0.01)
    copier.submit(make(checkpoints, 1))
    copier.close(30)
    assert damage(tmp_path / "far/run/step-00000001") is None
    assert not said


def test_a_dead_line_is_told_once_and_nothing_fails(checkpoints, line, tmp_path, said):
    Unsteady.failures = 10**6
    copier = Copier(FarFolder(line, "run"), checkpoints, attempts=2, backoff_s=0.01)
    for step in (1, 2, 3):
        copier.submit(make(checkpoints, step))
        while copier.held():
            pass
    copier.close(30)
    assert len(said) == 2
    assert "step-00000001: not copied" in said[0]
    assert "the line is cut" in said[0]
    assert said[1].endswith("step-00000001, step-00000002, step-00000003")
    assert not (tmp_path / "far/run/step-00000003/manifest.json").exists()


def test_submitting_never_waits_the_newest_wins_and_what_is_read_stays_on_the_disk(checkpoints, line, tmp_path):
    Unsteady.gate.clear()
    copier = Copier(FarFolder(line, "run"), checkpoints, backoff_s=0.01)
    first = make(checkpoints, 1)
    copier.submit(first)
    while first not in copier.held():
        pass
    for step in (2, 3, 4):
        copier.submit(make(checkpoints, step))
    assert copier.held() <= {first, checkpoints.path(4)}
    checkpoints.prune(4)
    assert checkpoints.steps() == [1, 3, 4]
    Unsteady.gate.set()
    copier.close(30)
    assert FarFolder(line, "run").steps() == [1, 4]


def test_the_end_waits_no_longer_than_asked_and_says_what_is_missing(checkpoints, line, said):
    Unsteady.gate.clear()
    copier = Copier(FarFolder(line, "run"), checkpoints)
    copier.submit(make(checkpoints, 1))
    copier.close(0.05)
    Unsteady.gate.set()
    assert said == [f"not copied to {line}/run: step-00000001"]


def test_any_fsspec_url_will_do(checkpoints):
    MemoryFileSystem.store.clear()
    far = FarFolder("memory://bucket/runs", "run")
    far.copy(make(checkpoints, 1))
    assert far.manifest("step-00000001") is not None
    far.remove("step-00000001")
    assert far.steps() == []


def test_copies_of_a_past_that_was_given_up_go(checkpoints, tmp_path):
    far = FarFolder(f"file://{tmp_path}/far", "run")
    for step in (2, 4, 9):
        far.copy(make(checkpoints, step))
    far.prune(4, 2, None)
    assert far.steps() == [2, 4]


def test_an_address_that_cannot_be_is_said_at_once():
    with pytest.raises(ValueError, match=r"checkpoint.copy_to nowhere://x"):
        FarFolder("nowhere://x", "run")


def test_a_run_goes_on_from_the_copies_on_a_machine_without_its_folder(runs, tmp_path):
    settings = {
        "train__steps": 4,
        "checkpoint__every": 2,
        "checkpoint__copy_to": f"file://{tmp_path}",
        "data__workers": 0,
    }
    runs.run("copied", **settings)
    before = runs.losses("copied")
    far = tmp_path / "copied"
    newest = far / "step-00000004"
    assert damage(newest) is None
    shutil.rmtree(newest)
    if not (far / "step-00000002").exists():  # the newer one may have overtaken it
        shutil.copytree(runs.folder("copied") / "checkpoints/step-00000002", far / "step-00000002")
    shutil.rmtree(runs.folder("copied"))
    out, _ = runs.run("copied", "--resume", "auto", **settings)
    assert "fetched step-00000002" in out
    assert "at step 2 of 4" in " ".join(out.split())
    assert runs.losses("copied") == before
    assert [record["step"] for record in runs.records("copied") if "loss" in record] == [1, 2, 3, 4]
    assert damage(newest) is None
    _, error = runs.run("copied", status=1, run__root=tmp_path / "elsewhere", **settings)
    assert "holds checkpoints of a run of this name" in error
