"""A run checks its kernels before the first step: what it asks, what it takes, and that it goes on or refuses."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from kernels import check, routes
from kernels.routes import AggregationCase, AttentionCase, case_from_json
from kernels.runtime import INTERPRETING, TRITON_INSTALLED
from tests.train.runs import ROOT
from train.config.file import load_config
from train.config.identity import config_digest
from train.config.patches import evaluated_at_once
from train.config.schema import Config, KernelSection
from train.engine.ranks import RankFacts
from train.plan.kernels import kernel_cases
from train.run import kernels as guard

SMALL = {
    "data.crop": 64, "eval.crop": 96, "model.backbone": "{name: unet, width: 8, blocks: [1, 1, 1]}",
    "model.levels": 3, "model.student": "{name: light, width: 16}", "model.spe.dim": 16, "train.batch": 8,
}  # fmt: skip


def small(tmp_path, **changes) -> Config:
    (tmp_path / "small.yaml").write_text("{}\n")
    values = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(tmp_path / "small.yaml", [f"{key}={value}" for key, value in values.items()])


# -- what a run calls -------------------------------------------------------------------------------------------------


def test_cases_are_those_of_a_micro_batch_and_of_an_evaluation(tmp_path):
    cases = kernel_cases(small(tmp_path, train__accumulation=2), world=2, device="cpu")
    attention = [(c.batch, c.channels, c.height, c.prior) for c in cases if isinstance(c, AttentionCase)]
    assert attention == [(2, 32, 8, 16), (2, 16, 16, 16), (1, 32, 12, 16), (1, 16, 24, 16)]
    levels = [c.levels for c in cases if isinstance(c, AggregationCase)]
    assert levels[0] == ((16, 16), (8, 8), (4, 4))
    assert {c.dtype for c in cases} == {"float32"}
    assert len(kernel_cases(small(tmp_path, eval="off"), world=1, device="cpu")) == 4
    assert kernel_cases(small(tmp_path, model__prior="false", train__distill_steps=0), world=1, device="cpu") == []


def test_cases_are_those_of_every_phase(tmp_path):
    later = "[{at: 10, crop: 96, batch: 4}, {at: 20, crop: 128, batch: 2}]"
    cases = kernel_cases(small(tmp_path, train__progressive=later, eval="off"), world=2, device="cpu")
    found = {(c.batch, c.height) for c in cases if isinstance(c, AttentionCase) and c.channels == 16}
    assert found == {(4, 16), (2, 24), (1, 32)}


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({"engine__precision": "bf16"}, "bfloat16"), ({"engine__precision": "fp16", "engine__zero": 1}, "float16")],
)
def test_cases_have_the_runs_precision_and_layout(tmp_path, changes, dtype):
    cases = kernel_cases(small(tmp_path, engine__channels_last="true", **changes), world=1, device="cpu")
    assert {c.dtype for c in cases} == {dtype}
    assert "channels_last" in {c.layout for c in cases}


def test_cases_of_a_gpu_are_listed_without_one_where_that_is_possible(tmp_path):
    config = small(tmp_path, engine__channels_last="true")
    found = {c for c in kernel_cases(config, 1, "cuda") if isinstance(c, AttentionCase)}
    assert {c.channels for c in found} == {16, 32}
    at_once = evaluated_at_once(config, 1, "cuda")
    assert at_once > 1  # a GPU evaluates in batches
    assert (at_once, 24) in {(c.batch, c.height) for c in found}
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="bf16 computes there can only be listed on a GPU"):
            kernel_cases(small(tmp_path, engine__precision="bf16"), 1, "cuda")
    with pytest.raises(ValueError, match="not divisible by 3 ranks"):
        kernel_cases(config, 3, "cpu")
    with pytest.raises(ValueError, match="for cpu or cuda"):
        kernel_cases(config, 1, "meta")


def test_the_command_lists_them(tmp_path, sharpprior):
    small(tmp_path)
    pairs = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    listing = ("kernels", "--config", tmp_path / "small.yaml", *pairs, "--ranks", 4, "--device", "cpu")
    status, out, _ = sharpprior(*listing)
    assert status == 0
    listed = [case_from_json(each) for each in json.loads(out.splitlines()[-1])]
    assert listed == kernel_cases(small(tmp_path), world=4, device="cpu")


def test_the_section_decides_no_losses_and_refuses_a_contradiction(tmp_path):
    assert config_digest(small(tmp_path)) == config_digest(small(tmp_path, kernels__check="false"))
    with pytest.raises(ValueError, match="strict refuses what the check finds wrong, but check is false"):
        KernelSection(check=False, strict=True)


# -- who checks, and who takes it -------------------------------------------------------------------------------------

A = AttentionCase(1, 16, 4, 4, 8, 2, "float32")


class Ranks:
    """An engine of four ranks on two hosts with a GPU each, seen from one of them."""

    world = 4
    device = torch.device("cuda:0")

    def __init__(self, rank: int, told: list) -> None:
        self.rank, self.told = rank, told
        self.ranks = [
            facts(0, "a", 0, "H100"),
            facts(1, "a", 1, "H100"),
            facts(2, "b", 0, "H100"),
            facts(3, "b", 1, "A10"),
        ]

    def agreed(self):
        import contextlib

        return contextlib.nullcontext()

    def gather(self, thing):
        return [*self.told, thing]


def facts(rank: int, host: str, local: int, gpu: str) -> RankFacts:
    return RankFacts(rank, host, local, "cuda", f"cuda:{local} {gpu}", str(rank), 1, "2", "0", "c")


@pytest.fixture
def checked(monkeypatch):
    """Ranks that called the check; it finds that the composed form must run."""
    calls = []

    def fake_check(cases, device, **options):
        calls.append((list(cases), device, options["strict"]))
        return [check.Decision((A,), "composed", ((A, "wrong dp"),))]

    monkeypatch.setattr(guard, "kernel_cases", lambda *_: [A])
    monkeypatch.setattr(guard.check, "check", fake_check)
    yield calls
    routes.use({})


def test_the_first_rank_of_each_kind_of_gpu_of_a_node_checks_for_the_others(tmp_path, checked):
    config = small(tmp_path)
    for rank, checks in enumerate((True, False, True, True)):
        checked.clear()
        told = [(("a", "H100"), {A: "composed"}), (("b", "H100"), {}), (("b", "A10"), {})]
        guard.guard_kernels(config, Ranks(rank, told if rank == 1 else []))
        assert bool(checked) is checks, rank
        assert routes.chosen(A.group, torch.empty(1, 16, 4, 4))[0] == "composed"
        routes.use({})


@pytest.mark.skipif(INTERPRETING, reason="there it is checked on a CPU too")
def test_nothing_happens_on_a_cpu_without_a_prior_or_switched_off(tmp_path, checked):
    on_cpu = SimpleNamespace(device=torch.device("cpu"))
    guard.guard_kernels(small(tmp_path), on_cpu)
    guard.guard_kernels(small(tmp_path, kernels__check="false"), Ranks(0, []))
    guard.guard_kernels(small(tmp_path, model__prior="false", train__distill_steps=0), Ranks(0, []))
    assert not checked
    assert routes.chosen(A.group, torch.empty(1, 16, 4, 4))[0] is None


def test_strict_is_passed_on(tmp_path, checked):
    guard.guard_kernels(small(tmp_path, kernels__strict="true"), Ranks(0, []))
    assert checked == [([A], torch.device("cuda:0"), True)]


# -- whole runs -------------------------------------------------------------------------------------------------------

TINY = {
    "data__crop": 32, "data__workers": 0, "eval": "off", "train__batch": 1, "train__steps": 3, "checkpoint__every": 3,
    "model__levels": 2, "model__spe__dim": 8, "model__spe__groups": 2, "model__spe__heads": 2,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING or not TRITON_INSTALLED, reason="runs the kernels in Triton's interpreter")
def test_a_run_with_broken_kernels_names_them_and_goes_on_and_strict_refuses(runs, tmp_path):
    environment = runs.environment() | {
        "TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path),
        "SHARPPRIOR_CHECK_PRELOAD": "tests.kernels.broken", "BROKEN": "wrong_sign,unwritten",
    }  # fmt: skip

    def run(name: str, **changes) -> tuple[int, str]:
        command = runs.command(name, **TINY, **changes)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    status, out = run("broken_kernels")
    assert status == 0, out[-4000:]
    loud = [line for line in out.splitlines() if "KERNELS WRONG ON THIS MACHINE" in line]
    assert len(loud) == 2, out[-4000:]
    assert "aggregation 1×8×" in loud[0]
    assert loud[0].endswith("triton: P is not finite; not repeatable; composed runs instead")
    assert "attention 1×16×8×8" in loud[1]
    assert "triton: wrong dp: relative RMS error 2 (bound " in loud[1]
    assert "was not checked before this run" not in out, "the listed cases are those that the run calls"
    assert "0 of 2 groups right as they are" in out
    assert list(runs.losses("broken_kernels")) == [1, 2, 3]
    assert loud[1].split("KERNELS")[1] in (runs.folder("broken_kernels") / "log.txt").read_text()

    status, out = run("strict_kernels", kernels__strict="true")
    assert status == 1
    assert "error: KERNELS WRONG ON THIS MACHINE: aggregation" in out
    assert "composed would run instead, which kernels.strict forbids" in out
    assert "Traceback" not in out
