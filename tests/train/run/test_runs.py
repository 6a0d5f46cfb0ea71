"""Whole training runs: what they write, that they resume exactly, that ranks and ZeRO stages change nothing."""

import json
import os
import shutil
import signal
import time

import pytest
from PIL import Image

from tests.train.weights import assert_same_weights
from train.checkpoint.manifest import damage

pytestmark = pytest.mark.slow

LONG = {"train__steps": 12, "train__distill_steps": 4, "checkpoint__every": 6}


def test_a_run_leaves_everything_that_it_promises(runs, unbroken):
    folder = runs.folder(unbroken)
    for name in ("config.yaml", "log.txt", "metrics.jsonl", "report.md", "panel.png", "curve.png", "report.html"):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").iterdir())
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "best", "latest", "step-00000006", "step-00000012",
    ]  # fmt: skip
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000012\n"
    assert list(runs.losses(unbroken)) == list(range(1, 13))
    report = (folder / "report.md").read_text()
    for tier in ("identity", "mild", "moderate", "severe", "extreme"):
        assert f"| {tier} | 4 |" in report
    assert "prior at the start" in report
    assert Image.open(folder / "panel.png").size == (3 * 218 + 8, 2 * (64 + 2 * 18 + 2 * 8) + 8)


def test_a_fresh_run_starts_as_the_identity(runs, unbroken):
    first = next(record for record in runs.records(unbroken) if record["step"] == 0)
    assert all(abs(row["gain"]) < 1e-9 for row in first["tiers"])


def test_every_evaluation_carries_the_same_yardsticks(runs, unbroken):
    """Chosen on training pairs once, so that only the model's own numbers move."""
    first, last = (record["tiers"] for record in runs.records(unbroken) if "tiers" in record)
    for before, after in zip(first, last, strict=True):
        assert list(before["yardsticks"]) == ["gaussian", "unsharp"]
        assert before["yardsticks"] == after["yardsticks"]
        best = max(
            ("psnr", before["input_psnr"]),
            *((n, v["psnr"]) for n, v in before["yardsticks"].items()),
            key=lambda x: x[1],
        )
        assert after["over_trivial"] == pytest.approx(after["restored_psnr"] - best[1], abs=1e-9)
        assert before["over_trivial"] <= before["gain"]
        assert after["over_low"] <= after["over_trivial"] <= after["over_high"]
    kept = json.loads((runs.folder(unbroken) / "yardsticks.json").read_text())
    assert kept["pairs"] == 5 * 5  # of the five training photographs
    assert "gain over the best trivial" in (runs.folder(unbroken) / "report.md").read_text()


def test_the_evaluation_before_the_first_step_can_be_left_out(runs):
    runs.run("no_start", train__steps=1, eval__at_start="false")
    records = runs.records("no_start")
    assert [record["step"] for record in records] == [1, 1]
    assert "tiers" in records[1]
    assert "not measured" in (runs.folder("no_start") / "report.md").read_text()


def test_distill_steps_train_the_student_alone(runs, unbroken):
    records = {record["step"]: record for record in runs.records(unbroken) if "loss" in record}
    assert "pixel" not in records[4]
    assert "pixel" in records[5]
    assert all("structure" in record for record in records.values())


def test_interrupted_and_resumed_losses_are_bit_identical_to_the_unbroken_ones(runs, unbroken):
    process = runs.start("broken", **LONG)
    metrics = runs.folder("broken") / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and '"step": 3' in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "go on with --resume auto" in " ".join(out.split())
    stopped = max(runs.losses("broken"))
    assert 3 <= stopped < 12
    assert (
        json.loads((runs.folder("broken") / f"checkpoints/step-{stopped:08d}/run.json").read_text())["step"] == stopped
    )
    out, _ = runs.run("broken", "--resume", "auto", **LONG)
    assert f"at step {stopped} of 12" in " ".join(out.split())
    assert runs.losses("broken") == runs.losses(unbroken)
    assert_same_weights(runs, "broken", unbroken, 12, tolerance=0)


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(runs, unbroken):
    folder = runs.folder("damaged")
    shutil.copytree(runs.folder(unbroken), folder)
    victim = folder / "checkpoints/step-00000012/model.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(bytes(content))
    (folder / "checkpoints/step-00000013.tmp").mkdir()
    out, _ = runs.run("damaged", "--resume", "auto", **LONG)
    out = " ".join(out.split())
    assert "damaged checkpoint, not used" in out
    assert "at step 6 of 12" in out
    assert runs.losses("damaged") == runs.losses(unbroken)
    assert damage(folder / "checkpoints/step-00000012") is None


def test_a_run_killed_before_its_report_writes_it_when_resumed(runs, unbroken):
    folder = runs.folder("unreported")
    shutil.copytree(runs.folder(unbroken), folder)
    wanted = (folder / "report.md").read_text().replace("unbroken", "unreported")
    for name in ("report.md", "panel.png"):
        (folder / name).unlink()
    runs.run("unreported", "--resume", "auto", **LONG)
    assert (folder / "report.md").read_text() == wanted
    assert (folder / "panel.png").read_bytes() == (runs.folder(unbroken) / "panel.png").read_bytes()


def test_a_run_starts_from_the_weights_of_another(runs, unbroken):
    runs.run("continued", "--init", str(runs.folder(unbroken)), train__steps=1, data__workers=0)
    first = next(record for record in runs.records("continued") if record["step"] == 0)
    last = [record for record in runs.records(unbroken) if "tiers" in record][-1]
    assert first["tiers"] == last["tiers"]
    assert first["similarity"] == pytest.approx(last["similarity"], abs=0.05)


def test_ctrl_c_while_workers_start_saves_and_exits_cleanly(runs):
    process = runs.start("early-stop", data__workers=2, train__steps=500, start_new_session=True)
    log = runs.folder("early-stop") / "log.txt"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and "step 0: gain" in log.read_text()):
        time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # the terminal's Ctrl-C goes to every process
    _, error = process.communicate(timeout=120)
    assert process.returncode in (0, 130), error
    assert "Traceback" not in error
