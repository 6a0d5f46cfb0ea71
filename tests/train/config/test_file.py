"""Configuration files: what is accepted, and the one line that says what is wrong and where."""

from pathlib import Path

import pytest

from train.config.file import ConfigError, build_config, configure, dump_config, load_config
from train.config.schema import Config
from train.config.sources import data_sources

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load_and_survive_a_round_trip(path, tmp_path):
    config = load_config(path)
    assert load_config(write(tmp_path / "again.yaml", dump_config(config))) == config
    assert build_config(config.model_dump(mode="json")) == config


def test_numbers_in_exponent_form_are_numbers(tmp_path):
    path = write(tmp_path / "a.yaml", "optim:\n  lr: 1e-4\ntrain: {steps: 10}\n")
    config = load_config(path, ["optim.warmup=3", "optim.weight_decay=2.5e-3"])
    assert config.optim.lr == 1e-4
    assert config.optim.weight_decay == 2.5e-3
    assert config.train.steps == 10
    assert isinstance(config.train.steps, int)


def test_a_file_extends_another_and_overrides_win(tmp_path):
    write(tmp_path / "base.yaml", "train: {steps: 10, batch: 4}\nmodel:\n  backbone: {name: unet, width: 24}\n")
    path = write(tmp_path / "a.yaml", "extends: base.yaml\ntrain: {batch: 6}\nmodel: {backbone: {width: 8}}\n")
    config = load_config(path, ["train.batch=2"])
    assert (config.train.steps, config.train.batch) == (10, 2)
    assert config.model.backbone == {"name": "unet", "width": 8}
    assert configure(["blur.preset=mild"]).blur.tiers.extreme.share == 0  # a preset gives every value


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("optim:\n  lrr: 1\n", [], ["a.yaml:2", "unknown key optim.lrr", "did you mean lr?"]),
        ("optim: {}\ntrian:\n  steps: 3\n", [], ["a.yaml:2", "unknown key trian", "did you mean train?"]),
        ("blur:\n  tiers:\n    sever: {}\n", [], ["a.yaml:3", "blur.tiers.sever", "did you mean severe?"]),
        ("train:\n  batch: 8\n  steps: many\n", [], ["a.yaml:3", "train.steps", "'many'"]),
        ("train:\n  steps: 5\n  distill_steps: 6\n", [], ["a.yaml:1", "distill_steps 6 exceeds steps 5"]),
        ("train:\n  steps: 5\n  steps: 6\n", [], ["a.yaml:3", "given twice"]),
        ("", ["optim.lrr=3"], ["--set optim.lrr=3", "did you mean lr?"]),
        ("", ["model.student={name: light, weights: a.pth}"], ["light has no weights to read", "leave weights out"]),
        ("", ["optim.lr"], ["--set optim.lr", "key.sub=value"]),
        ("", ["optim.lr=-1"], ["--set optim.lr=-1", "greater than 0"]),
        ("", ["optim.lr=.nan"], ["optim.lr"]),
        ("train: [1\n", [], ["a.yaml:", "not YAML"]),
        ("- 1\n", [], ["a.yaml:1", "section"]),
        ("extends: absent.yaml\n", [], ["absent.yaml", "cannot read"]),
        ("extends: a.yaml\n", [], ["a.yaml", "circle"]),
        ("engine: {zero: 4}\n", [], ["a.yaml:1", "engine.zero"]),
        ("engine: {offload: cpu}\n", [], ["offload cpu needs zero"]),
        ("model: {spe: {dim: 30, groups: 4}}\n", [], ["groups 4 does not divide"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_place_and_the_way_out(text, overrides, expected, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path / "a.yaml", text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read the configuration"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_batch_that_the_ranks_do_not_divide_is_refused():
    config = configure(["train.batch=8", "train.accumulation=2"])
    assert config.micro_batch(2) == 2
    with pytest.raises(ValueError, match="not divisible by 3 ranks × 2"):
        config.micro_batch(3)


def test_training_data_is_one_set_or_several_with_weights(tmp_path, monkeypatch):
    monkeypatch.delenv("SHARPPRIOR_DATA", raising=False)
    path = write(tmp_path / "a.yaml", "data: {train: [{path: a, weight: 3}, {path: b}], val: c}\n")
    train, val = data_sources(load_config(path))
    assert [(source.path, source.weight) for source in train] == [("a", 3.0), ("b", 1.0)]
    assert val.path == "c"
    with pytest.raises(ConfigError, match="did you mean weight"):
        load_config(write(tmp_path / "b.yaml", "data: {train: [{path: a, wieght: 3}]}\n"))


def test_the_variable_names_the_data_unless_the_configuration_does(tmp_path, monkeypatch):
    monkeypatch.delenv("SHARPPRIOR_DATA", raising=False)
    assert all("bundled" in source.why for source in (*data_sources(Config())[0], data_sources(Config())[1]))
    (tmp_path / "train").mkdir()
    monkeypatch.setenv("SHARPPRIOR_DATA", str(tmp_path))
    (train,), val = data_sources(Config())
    assert train.path == str(tmp_path / "train")
    assert "bundled" in val.why
    (tmp_path / "val").mkdir()
    assert data_sources(Config())[1].path == str(tmp_path / "val")
    (train,), _ = data_sources(configure(["data.train=elsewhere"]))
    assert train.path == "elsewhere"
    monkeypatch.setenv("SHARPPRIOR_DATA", "s3://bucket/set")
    assert data_sources(Config())[0][0].path == "s3://bucket/set"
