"""Runs whose prior rests: bit for bit unchanged under every stage of ZeRO, no teacher, resumed as if never stopped."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from train.checkpoint.export import export_model

pytestmark = pytest.mark.slow


def model(runs, name: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(runs.folder(name) / f"checkpoints/step-{step:08d}/model.safetensors")


def unchanged(runs, name: str, first: int, last: int, prefix: str) -> bool:
    """Whether the averaged weights of a part are the same bits at two steps."""
    a, b = model(runs, name, first), model(runs, name, last)
    return all(torch.equal(b[key], value) for key, value in a.items() if key.startswith(prefix))


def again_from(runs, name: str, step: int, *arguments: str, **settings: object) -> str:
    """A copy of a finished run that lost what came after a step, and went on."""
    twin = f"{name}-again"
    shutil.copytree(runs.folder(name), runs.folder(twin))
    for folder in (runs.folder(twin) / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    runs.run(twin, "--resume", "auto", *arguments, **settings)
    return twin


@pytest.mark.parametrize(
    "how", [{}, {"engine__zero": 3, "ranks": 2}, {"engine__zero": 2, "engine__offload": "cpu"}], ids=str
)
def test_a_prior_that_rests_after_its_distillation_never_moves_again(runs, how):
    name = f"rests-{len(how)}-{how.get('ranks', 1)}"
    settings = {"train__steps": 5, "train__distill_steps": 2, "train__spe_steps": 1, "train__student_frozen": "true"}
    settings |= {"checkpoint__every": 1, "checkpoint__keep": 5, "data__workers": 0, "eval__enabled": "false", **how}
    out, _ = runs.run(name, **settings)
    assert "step 1: stage distill" in out
    assert "step 3: stage spe, the prior rests" in " ".join(out.split())
    assert "step 4: stage deblur, the prior rests" in " ".join(out.split())
    assert not unchanged(runs, name, 1, 2, "prior.")
    assert unchanged(runs, name, 2, 5, "prior.")
    assert unchanged(runs, name, 1, 3, "backbone.")
    assert not unchanged(runs, name, 2, 3, "spe.")
    assert not unchanged(runs, name, 3, 4, "backbone.")
    steps = [record for record in runs.records(name) if "loss" in record]
    assert ["structure" in record for record in steps] == [True, True, False, False, False]
    assert [record["shares"]["teacher"] > 0 for record in steps] == [True, True, False, False, False]
    for file in (runs.folder(name) / "checkpoints/step-00000005/state").glob("rank-*"):
        moments = [v for k, v in load_file(file).items() if k.startswith("exp_avg") and "/prior." in k]
        assert moments
        assert not any(value.any() for value in moments), "gradients of a part that rests"
    twin = again_from(runs, name, 3, **settings)
    assert runs.losses(twin) == runs.losses(name)
    assert model(runs, twin, 5).keys() == model(runs, name, 5).keys()
    assert all(torch.equal(value, model(runs, twin, 5)[key]) for key, value in model(runs, name, 5).items())


def test_a_prior_of_another_run_trains_a_network_without_a_teacher_and_goes_on_without_its_file(
    runs, unbroken, tmp_path
):
    file = tmp_path / "prior.safetensors"
    export_model(runs.folder(unbroken), file, which="latest", dtype="fp32", overwrite=False, prior=True)
    shape = {"model__backbone": "{name: unet, width: 12, blocks: [1, 1, 1]}", "data__workers": 0, "eval__per_tier": 1}
    shape |= {"train__steps": 6, "train__spe_steps": 2, "checkpoint__every": 2}
    out, _ = runs.run("plugged", "--prior", str(file), **shape)
    assert f"prior taken from {file}" in " ".join(out.split())
    last = runs.folder("plugged") / "checkpoints/step-00000006"
    facts = json.loads((last / "run.json").read_text())
    assert facts["origins"]["prior"]["from"] == str(file)
    assert len(facts["origins"]["prior"]["digest"]) == 32
    assert facts["teacher_digest"] is None
    given, now = load_file(file), model(runs, "plugged", 6)
    assert all(torch.equal(now[name], value) for name, value in given.items())
    assert not unchanged(runs, "plugged", 2, 6, "backbone.")
    assert "with the frozen prior of efficientnet_lite0" in (runs.folder("plugged") / "report.md").read_text()
    file.unlink()
    twin = again_from(runs, "plugged", 2, "--prior", str(file), **shape)
    assert runs.losses(twin) == runs.losses("plugged")
    again = json.loads((runs.folder(twin) / "checkpoints/step-00000006/run.json").read_text())
    assert again["origins"] == facts["origins"]
    _, error = runs.run("nowhere", "--prior", str(file), status=1, **shape)
    assert "no such run" in error
