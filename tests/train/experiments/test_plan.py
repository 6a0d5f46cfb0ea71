"""An experiment's file: which runs it makes, in which order, with which settings; and what is wrong in one."""

from pathlib import Path

import pytest

from train.config.file import ConfigError
from train.experiments.plan import FOLDER, load_experiment, trials

FILE = """
title: Two ways
config: base.yaml
set: {train.steps: 6, model.spe: {dim: 8, groups: 2}}
seeds: [3, 4]
first:
  taught: {set: {train.distill_steps: 6}}
arms:
  bare: {set: {model.prior: false}}
  plugged: {prior: taught, set: {optim.lr: 1e-4}}
oracle: plugged
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("model: {backbone: {name: unet, width: 8, blocks: [1, 1]}, levels: 3}\n")
    path = tmp_path / "two.yaml"
    path.write_text(FILE)
    return path


def test_runs_come_seed_by_seed_after_what_they_take(file, tmp_path):
    name, experiment = load_experiment(str(file))
    found = list(trials(experiment, tmp_path / "runs", data={"val": "/v"}, overrides=["run.seed=9", "train.batch=2"]))
    assert name == "two"
    names = [trial.name for trial in found]
    assert names == ["taught-seed3", "bare-seed3", "plugged-seed3", "bare-seed4", "plugged-seed4"]
    assert [trial.needs for trial in found] == [None, None, "taught-seed3", None, "taught-seed3"]
    assert experiment.compared_with == "bare"
    config = found[3].load()
    assert (config.run.name, config.run.seed, config.run.root) == ("bare-seed4", 4, str(tmp_path / "runs"))
    assert (config.train.steps, config.train.batch, config.data.val, config.model.prior) == (6, 2, "/v", False)
    assert found[0].load().model.spe.dim == 8
    settings = dict(setting.split("=", 1) for setting in found[4].settings)
    assert settings["model.prior_from"] == str(tmp_path / "runs" / "taught-seed3")
    assert float(settings["optim.lr"]) == 1e-4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("oracle: plugged", "oracle: plug", "oracle plug: no such arm; there are bare, plugged"),
        ("prior: taught", "prior: bare", "plugged: prior bare is no run of `first`: taught"),
        ("bare:", "taught:", "taught: both in `first` and an arm"),
        ("base.yaml", "none.yaml", "none.yaml: no such file"),
        ("title:", "titel:", "unknown key titel"),
        ("seeds: [3, 4]", "seeds: [", "not YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_name(file, old, new, message):
    file.write_text(FILE.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        load_experiment(str(file))
    assert "two.yaml" in str(error.value)


def test_an_experiment_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match=r"experiments here: .*distill"):
        load_experiment("nothing")


def test_precision_must_not_be_chosen_anew_in_every_run(file, tmp_path):
    file.write_text(FILE.replace("train.steps: 6", "train.steps: 6, engine.precision: auto"))
    _, experiment = load_experiment(str(file))
    with pytest.raises(ValueError, match="set fp32 or bf16"):
        next(trials(experiment, tmp_path)).load()


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_every_experiment_of_the_project_is_possible(name, tmp_path):
    _, experiment = load_experiment(name)
    for trial in trials(experiment, tmp_path):
        if trial.needs is None:
            trial.load()
        else:
            with pytest.raises((ValueError, ConfigError), match=trial.needs):  # it is not made yet
                trial.load()
