"""`engine.precision: auto`: what a run takes, on what grounds, and that it keeps it."""

import itertools
import re
import shutil

import pytest
import torch
from rich.console import Console

from train.config.file import dump_config, load_config
from train.config.schema import Config
from train.plan.cost import Cluster
from train.plan.kernels import kernel_cases
from train.plan.report import print_plan
from train.run import precision
from train.run.precision import choose_precision, time_steps

SMALL = {
    "data": {"crop": 64},
    "model": {
        "backbone": {"name": "unet", "width": 8, "blocks": [1, 1]}, "levels": 2,
        "student": {"name": "light", "width": 8}, "spe": {"dim": 8},
    },
    "train": {"batch": 4},
}  # fmt: skip


def auto(tmp_path, **engine) -> Config:
    values = {"run": {"root": str(tmp_path)}, "engine": {"precision": "auto", **engine}, **SMALL}
    return Config.model_validate(values)


@pytest.fixture
def times(monkeypatch):
    """Says what measuring will find; without it a measurement fails the test."""

    def find(fp32: float, bf16: float) -> None:
        monkeypatch.setattr(precision, "time_steps", lambda config: (4, fp32, bf16))

    def unexpected(config: Config) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "time_steps", unexpected)
    monkeypatch.setattr(precision, "world_size", lambda: 1)
    return find


@pytest.mark.parametrize(
    ("fp32", "bf16", "taken"), [(0.58, 0.46, "bf16"), (0.5, 0.474, "bf16"), (0.5, 0.476, "fp32"), (0.58, 0.68, "fp32")]
)
def test_one_rank_on_a_cpu_takes_what_is_faster_by_the_margin_and_says_both_times(tmp_path, times, fp32, bf16, taken):
    times(fp32, bf16)
    config, told = choose_precision(auto(tmp_path), None)
    assert config.engine.precision == taken
    assert told == (
        f"engine.precision auto: {taken} (measured: a step of 4 images of 64 px takes {fp32} s in fp32, "
        f"{bf16} s in bf16)"
    )


@pytest.mark.parametrize("given", ["fp32", "bf16", "bf16_params", "fp16"])
def test_another_precision_stays_and_nothing_is_said(tmp_path, times, given):
    config = auto(tmp_path, precision=given, zero=1)
    assert choose_precision(config, "auto") == (config, None)


def test_several_ranks_on_cpus_take_fp32_without_measuring(tmp_path, times, monkeypatch):
    monkeypatch.setattr(precision, "world_size", lambda: 2)
    config, told = choose_precision(auto(tmp_path), None)
    assert config.engine.precision == "fp32"
    assert "several ranks on CPUs do not measure" in told


@pytest.mark.parametrize(("native", "taken"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_takes_bf16_where_it_computes_it(tmp_path, times, monkeypatch, native, taken):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    config, told = choose_precision(auto(tmp_path), None)
    assert config.engine.precision == taken
    assert told.startswith(f"engine.precision auto: {taken} (this GPU computes ")


def saved(folder, taken: str) -> None:
    folder.mkdir(parents=True)
    config = Config.model_validate({**SMALL, "engine": {"precision": taken}})
    (folder / "config.yaml").write_text(dump_config(config))


def test_a_run_that_goes_on_keeps_its_precision(tmp_path, times):
    config = auto(tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    saved(checkpoints / "step-00000002", "fp32")
    saved(checkpoints / "step-00000010", "bf16")
    for resume, taken in (("auto", "bf16"), (str(checkpoints / "step-00000002"), "fp32")):
        found, told = choose_precision(config, resume)
        assert found.engine.precision == taken
        assert "that of the run that goes on" in told
    (checkpoints / "step-00000010" / "config.yaml").write_text("engine: [")
    assert choose_precision(config, "auto")[0].engine.precision == "fp32"
    times(2.0, 1.0)  # another run of the folder, or none to go on with
    assert choose_precision(config, None)[0].engine.precision == "bf16"
    shutil.rmtree(checkpoints)
    assert choose_precision(config, "auto")[0].engine.precision == "bf16"


def test_a_run_whose_checkpoints_are_elsewhere_keeps_it_too(tmp_path, times):
    far = tmp_path / "far" / "run"
    saved(far / "step-00000002", "bf16")
    saved(far / "step-00000010", "fp32")  # not whole: no manifest
    (far / "step-00000002" / "manifest.json").write_text('{"config.yaml": {}}')
    config = auto(tmp_path).model_copy(update={"checkpoint": Config.model_validate(
        {"checkpoint": {"copy_to": f"file://{tmp_path}/far"}}).checkpoint})  # fmt: skip
    assert choose_precision(config, "auto")[0].engine.precision == "bf16"


def test_measuring_runs_both_on_the_runs_network_and_moves_no_generator(tmp_path):
    before = torch.random.get_rng_state()
    count, fp32, bf16 = time_steps(auto(tmp_path, cpu_threads=1, checkpointing=True))
    assert 1 <= count <= 4
    assert 0 < fp32 < 5
    assert 0 < bf16 < 5
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_timed_includes_the_backbones_backward_pass_behind_a_gate(tmp_path, monkeypatch):
    built, plain = [], precision.build_model
    monkeypatch.setattr(precision, "build_model", lambda *given, **how: built.append(plain(*given, **how)) or built[0])
    time_steps(Config.model_validate({**auto(tmp_path).model_dump(), "model": {**SMALL["model"], "gate": True}}))
    assert all(parameter.grad is not None for parameter in built[0].backbone.parameters())


def test_slow_steps_are_measured_once_on_one_image(tmp_path, monkeypatch):
    seen = []
    plain = precision.shape_network

    def watched(network, *arguments) -> None:
        plain(network, *arguments)
        network.register_forward_pre_hook(
            lambda _, inputs: seen.append((len(inputs[0]), torch.is_autocast_enabled("cpu")))
        )

    monkeypatch.setattr(precision, "shape_network", watched)
    ticks = itertools.count(step=30.0)
    assert time_steps(auto(tmp_path, cpu_threads=1), clock=lambda: next(ticks)) == (1, 30.0, 30.0)
    assert seen == [(1, False), (1, False), (1, True)]


def test_plans_count_auto_as_bf16(tmp_path, capsys):
    config = auto(tmp_path)
    assert {case.dtype for case in kernel_cases(config, 1, "cpu")} == {"bfloat16"}
    console = Console(width=200, record=True)
    print_plan(config, Cluster(1, 2), console)
    assert "; bf16 (auto)" in console.export_text()


def test_a_run_writes_what_it_took_and_goes_on_with_it(runs):
    settings = {"engine__precision": "auto", "eval": "off", "model__prior": "false", "checkpoint__every": 1}
    out, _ = runs.run("auto", train__steps=1, **settings)
    (taken, fp32, bf16) = re.search(
        r"auto: (\w+) \(measured: .* takes (\S+) s in fp32, (\S+) s in bf16\)", out
    ).groups()
    assert taken == ("bf16" if float(bf16) <= 0.95 * float(fp32) else "fp32")
    folder = runs.folder("auto")
    for place in (folder, folder / "checkpoints" / "step-00000001"):
        assert load_config(place / "config.yaml").engine.precision == taken
    assert f"auto: {taken} (measured" in (folder / "log.txt").read_text()
    out, _ = runs.run("auto", "--resume", "auto", "--extend", "2", train__steps=1, **settings)
    assert f"engine.precision auto: {taken} (that of the run that goes on)" in out
    assert list(runs.losses("auto")) == [1, 2]
