"""Runs with other teachers and students, from a user's command to the saved model; and what a user can get wrong."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from model.encoder import EncoderSpec, build_encoder
from model.teachers import build_teachers
from tests.model.models import deblurrer
from train import ROOT
from train.checkpoint.export import export_model
from train.checkpoint.saved import load_model
from train.config.file import ConfigError, configure
from train.experiments import ablation
from train.experiments.ablation import table
from train.plan.dry_run import dry_run
from train.run.schedule import cfl_weight
from train.run.shares import StepShares, mean_shares

pytestmark = pytest.mark.slow

EVALUATE = [sys.executable, "-m", "train.cli", "evaluate"]


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(build_encoder(EncoderSpec("test_vit", weights="random")).net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def vit_run(runs, vit_file):
    """Two steps that distill and one that deblurs, a transformer from a file being teacher and student."""
    teacher = f"{{name: test_vit, weights: '{vit_file}'}}"
    settings = {"train__steps": 3, "train__distill_steps": 2, "model__teacher": teacher, "eval__per_tier": 1}
    runs.run("vit", eval__every=2, data__workers=0, **settings)
    return "vit"


def test_a_transformer_teaches_and_its_model_is_evaluated_without_the_file(runs, vit_run, vit_file, tmp_path):
    folder, records = runs.folder(vit_run), runs.records(vit_run)
    assert "the prior of test_vit" in (folder / "report.md").read_text()
    last = [record for record in records if "tiers" in record][-1]
    assert len(last["similarity"]) == len(last["student_similarity"]) == len(last["blurry_similarity"]) == 3
    first = next(record for record in records if "tiers" in record)
    assert first["similarity"] == first["student_similarity"] == pytest.approx(first["blurry_similarity"], abs=1e-5)
    assert last["similarity"] != first["similarity"]
    result = subprocess.run(
        [*EVALUATE, str(folder), "-o", str(tmp_path / "again"), "--device", "cpu"],
        cwd=ROOT, env=runs.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"| 3 | 16 | {last['similarity'][2]:.3f} |" in (tmp_path / "again" / "report.md").read_text()
    export_model(folder, tmp_path / "small.safetensors", which="latest", dtype="fp32", overwrite=False)
    vit_file.rename(vit_file.with_suffix(".away"))
    try:
        exported, trained = (load_model(p, torch.device("cpu"))[0] for p in (tmp_path / "small.safetensors", folder))
    finally:
        vit_file.with_suffix(".away").rename(vit_file)
    x = torch.rand(1, 3, 40, 72, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exported(x).restored[-1], trained(x).restored[-1])


def test_the_report_draws_the_similarities_and_tells_the_shares(runs, vit_run):
    folder = runs.folder(vit_run)
    assert Image.open(folder / "similarity.png").size[0] > 600
    report = (folder / "report.md").read_text()
    assert "similarity.png" in report
    assert "| share of a step | " in report
    shares = {record["step"]: record["shares"] for record in runs.records(vit_run) if "shares" in record}
    assert set(shares[1]) == {
        *("student", "fusion", "teacher", "backbone", "spe", "data"),
        *("backward", "update", "rest"),
    }
    assert all(sum(each.values()) == pytest.approx(1) for each in shares.values())
    assert shares[1]["backbone"] == shares[1]["spe"] == 0
    assert all(value > 0 for name, value in shares[3].items() if name != "rest")
    assert shares[3]["rest"] < 0.4


def test_two_teachers_a_light_student_and_a_falling_weight(runs, vit_file):
    teachers = f"[{{name: test_vit, weights: '{vit_file}', weight: 3}}, {{name: test_resnet, weights: random}}]"
    settings = {"train__steps": 3, "model__teacher": teachers, "model__student__name": "light", "loss__cfl": 0.5}
    runs.run("pair", data__workers=0, eval__per_tier=1, loss__cfl_final=0.1, **settings)
    steps = [record for record in runs.records("pair") if "loss" in record]
    assert [record["cfl_weight"] for record in steps] == pytest.approx([0.5, 0.3, 0.1])
    last = [record for record in runs.records("pair") if "tiers" in record][-1]
    assert len(last["similarity"]) == 3
    assert last["student_similarity"] == []
    report = (runs.folder("pair") / "report.md").read_text()
    assert "the prior of test_vit + test_resnet" in report
    assert "other channels" in report


def test_the_weight_of_feature_learning_over_the_steps():
    for schedule, middle in (("linear", 0.55), ("cosine", 0.55)):
        config = configure(["train.steps=13", "train.distill_steps=2", "loss.cfl=1.0", "loss.cfl_final=0.1",
                            f"loss.cfl_schedule={schedule}"])  # fmt: skip
        weights = [cfl_weight(step, config) for step in range(13)]
        assert weights[:3] == [1.0, 1.0, 1.0]
        assert weights[7] == pytest.approx(middle)
        assert weights[-1] == pytest.approx(0.1)
        assert weights[2:] == sorted(weights[2:], reverse=True)
    assert weights[4] != pytest.approx(1 - 0.9 * 2 / 10)  # the cosine starts slowly
    constant = configure(["train.steps=5", "loss.cfl=0.3"])
    assert {cfl_weight(step, constant) for step in range(5)} == {0.3}


def test_one_teacher_may_be_written_without_a_list_and_overridden():
    one = configure(["model.teacher={name: resnet18}", "model.teacher.weights=random"])
    assert [(each.name, each.weights) for each in one.model.teacher] == [("resnet18", "random")]
    numbered = configure(["model.teacher.0.name=resnet18", "model.teacher.weights=random", "model.teacher.0.weight=2"])
    assert numbered.model.teacher[0].model_dump(include={"name", "weights", "weight"}) == {
        "name": "resnet18", "weights": "random", "weight": 2.0
    }  # fmt: skip
    listed = ["model.teacher=[{name: resnet18}, {name: test_vit}]", "model.teacher.1.weight=2"]
    assert [each.weight for each in configure(listed).model.teacher] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.teacher=[]"], "at least 1"),
        (["model.teacher=[{name: a}, {name: b}]", "model.teacher.weights=x"], "there are 2: say which"),
        (["model.teacher=[{name: a}]", "model.teacher.3.weights=x"], "there are 1, counted from 0"),
        (["model.teacher={nam: a}"], "did you mean name"),
        (["model.teacher={name: a, weight: 0}"], "greater than 0"),
        (["model.teacher.precision=fp16"], "'auto', 'fp32' or 'bf16'"),
        (["model.levels=3", "model.student.frozen_levels=4"], "exceeds the 3 levels"),
        (["loss.match=same_level"], "set model.student.fusion to same_level"),
        (["loss.cfl_final=-1"], "greater than or equal to 0"),
        (["loss.cfl_final=0", "train.steps=5", "train.distill_steps=5"], "all steps distill"),
        (["loss.statistics_crops=12"], "multiple of 8"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings, words):
    with pytest.raises(ConfigError, match=words) as caught:
        configure(settings)
    assert "\n" not in str(caught.value)


def test_a_teacher_that_cannot_be_says_which_and_why(vit_file, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(vit_file.read_bytes()[:-100])
    for teacher, words in (
        (f"{{name: test_vit, weights: {damaged}}}", f"the weights of test_vit cannot be read: {damaged} is damaged"),
        (f"{{name: test_vit2, weights: {vit_file}}}", "is not a checkpoint of timm's test_vit2: it lacks"),
        ("[{name: test_resnet, weights: random}, {name: volo_d1_224}]", "volo_d1_224 has features at strides 8, 16"),
        ("{name: light}", "light .* can be a student only"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            build_teachers(configure([f"model.teacher={teacher}"]).model)
        assert "\n" not in str(caught.value)


def test_a_dry_run_reads_the_weights_that_the_run_will_need(tmp_path):
    absent, random = tmp_path / "absent.pth", "{name: test_resnet, weights: random}"
    for settings in (
        [f"model.teacher={{name: test_resnet, weights: {absent}}}"],
        [f"model.teacher={random}", f"model.student={{name: test_resnet, weights: {absent}}}"],
    ):
        with pytest.raises(ValueError, match=f"weights of test_resnet are absent: no file {absent}"):
            dry_run(configure(["model.levels=3", "data.crop=64", *settings]), 1)
    with pytest.raises(ValueError, match="no classifier behind its deepest level"):
        dry_run(configure(["model.levels=3", "data.crop=64", "loss.logits=1", f"model.teacher={random}"]), 1)


def test_shares_count_training_steps_alone():
    model = deblurrer(backbone={"name": "unet", "width": 8, "blocks": [1, 1]}, prior=False)
    shares = StepShares(model)
    model.eval()(torch.rand(1, 3, 16, 16))
    assert shares.take(1.0, 0.25) == {
        **{"backward": 0, "update": 0, "backbone": 0, "spe": 0},
        **{"data": 0.25, "rest": 0.75},
    }
    model.train()(torch.rand(1, 3, 16, 16))
    assert shares.take(1.0, 0.0)["backbone"] > 0
    distill, whole = {"backbone": 0.0, "student": 1.0}, {"backbone": 0.5, "student": 0.5}
    assert mean_shares([{"shares": each} for each in (distill, whole, whole)]) == whole
    assert mean_shares([{"step": 1}]) == {}


def test_the_ablation_s_table_is_the_mean_and_spread_over_seeds():
    def ends(*levels: float) -> list[dict]:
        return [{"similarity": [level, 2 * level], "blurry_similarity": [0.1, 0.2]} for level in levels]

    lines = table({"cross-level": ends(0.2, 0.3, 0.4), "same-level": ends(0.25)}).splitlines()
    assert lines[0] == "| way | seeds | level 1, stride 4 | level 2, stride 8 |"
    assert lines[2] == "| cross-level | 3 | 0.300 ± 0.100 (+0.200 ± 0.100) | 0.600 ± 0.200 (+0.400 ± 0.200) |"
    assert lines[3] == "| same-level | 1 | 0.250 (+0.150) | 0.500 (+0.300) |"
    assert lines[4] == "| teacher on the blurry image | 3 | 0.100 ± 0.000 | 0.200 ± 0.000 |"


def test_the_ablation_takes_finished_runs_and_refuses_others(runs, vit_run, tmp_path, capsys):
    """On the run above: nothing is trained again, and settings that are not the run's are refused."""
    root = tmp_path / "ablation"
    root.mkdir()
    (root / "cross-level-seed3").symlink_to(runs.folder(vit_run))
    command = ["--config", str(runs.folder(vit_run) / "config.yaml"), "--root", str(root)]
    command += ["--ways", "cross-level", "--seeds", "3"]
    ablation.main(command)
    last = [record for record in runs.records(vit_run) if "tiers" in record][-1]
    said = capsys.readouterr().out
    assert f"| cross-level | 1 | {last['similarity'][0]:.3f} (" in said
    assert (root / "ablation.md").read_text() == said
    with pytest.raises(ValueError, match="holds a run with other settings: choose another --root"):
        ablation.main([*command, "--set", "loss.context=0.3"])
