"""`kernels.check`: processes that die, hang or lie are told apart; what is wrong is replaced; findings are kept.

The kernels run in Triton's interpreter here; what is right and wrong of one kernel is in test_judge.py.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kernels.check import Decision, WrongKernelsError, choices, decide, possible, read_cases, refuse
from kernels.routes import AggregationCase, AttentionCase, case_from_json, case_to_json
from kernels.runtime import INTERPRETING, TRITON_INSTALLED
from kernels.verdict import Verdict, cache_folder, machine
from kernels.workers import Conditions, judged

pytestmark = pytest.mark.skipif(INTERPRETING, reason="already inside the interpreter lane")
needs_triton = pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed")
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CASE = AttentionCase(1, 16, 3, 4, 8, 2, "float32")
LARGER = AttentionCase(1, 16, 9, 9, 8, 2, "float32")  # of the same group
OTHER = AttentionCase(1, 24, 2, 3, 8, 2, "float32")
AGGREGATION = AggregationCase(1, 4, 3, 2, 2, ((2, 2), (1, 1)), "float32")
RIGHT = {"right": True, "why": None}


# -- processes --------------------------------------------------------------------------------------------------------


def command(folder: Path, *arguments: str, broken: str | None = None, interpret: str = "1"):
    """(status, stdout, stderr) of the command with its cache below a folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SHARPPRIOR_")}
    kept |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": interpret, "XDG_CACHE_HOME": str(folder)}
    kept |= {"SHARPPRIOR_CHECK_PRELOAD": "tests.kernels.broken", "BROKEN": broken} if broken else {}
    full = [sys.executable, "-m", "kernels.check", *arguments]
    done = subprocess.run(full, cwd=ROOT, env=kept, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@needs_triton
def test_a_wrong_kernel_is_named_and_replaced_and_strict_refuses(tmp_path):
    cases, written = tmp_path / "cases.json", tmp_path / "out.json"
    cases.write_text(json.dumps([case_to_json(CASE)]))
    status, out, error = command(tmp_path, "--cases", str(cases), "--json", str(written), broken="wrong_sign")
    assert (status, error) == (1, "")
    *rows, loud = out.splitlines()
    assert [row.partition(": ")[2].partition(":")[0] for row in rows] == ["triton", "triton-tiled", "composed"]
    assert rows[-1] == f"{CASE}: composed: right"
    assert loud.startswith(f"KERNELS WRONG ON THIS MACHINE: {CASE}: triton: wrong dp: relative RMS error 2 (bound ")
    assert loud.endswith("; composed runs instead")
    content = json.loads(written.read_text())
    assert content["choices"] == [{"cases": [str(CASE)], "route": "composed"}]
    assert [row["right"] for row in content["findings"]] == [False, False, True]
    # What is known is not judged again: no process could come up in no time.
    status, out, error = command(tmp_path, "--cases", str(cases), "--strict", "--limit", "0", broken="wrong_sign")
    assert status == 1
    assert out.splitlines() == rows
    assert error.startswith("error: KERNELS WRONG ON THIS MACHINE: attention")
    assert "composed would run instead, which kernels.strict forbids" in error
    # With other software (here: nothing broken) nothing is known.
    status, out, error = command(tmp_path, "--cases", str(cases))
    assert (status, out, error) == (0, f"{CASE}: triton: right\n", "")


@needs_triton
def test_a_process_that_dies_or_hangs_is_told_apart_and_the_rest_judged(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("BROKEN", "die_by_width")
    cases = [AttentionCase(1, width, 2, 3, 8, 2, "float32") for width in (16, 24, 32, 40)]
    again = AttentionCase(1, 32, 3, 3, 8, 2, "float32")  # of the group that hangs
    waited = []
    conditions = Conditions(CPU, limit_s=30.0, preload="tests.kernels.broken", alive=lambda: waited.append(1))
    found = dict(judged("triton", [*cases[:3], again, *cases[3:]], conditions))
    assert [found[case]["why"] for case in cases] == [
        "died by SIGSEGV",
        "died by SIGABRT",
        "timed out after 30 s",
        None,
    ]
    assert found[cases[-1]]["right"]
    assert found[again]["why"] == f"not tried: {cases[2]} timed out after 30 s"
    passing = [case for case, each in found.items() if "passing" in each]
    assert passing == [cases[2], again], "a loaded machine may be as slow: kept for nobody; the others happen again"
    assert len(waited) > 20, "somebody is told every second that it goes on"


def test_a_process_that_cannot_start_is_told_and_kept_for_nobody(monkeypatch):
    conditions = Conditions(CPU, preload="no_such_module_anywhere")
    started = time.monotonic()
    found = dict(judged("composed", [CASE, LARGER, OTHER], conditions))
    assert {each["why"] for each in found.values()} == {
        "a process for it could not start: ended with status 1: ModuleNotFoundError: No module named "
        "'no_such_module_anywhere'"
    }
    assert all(each["passing"] and not each["right"] for each in found.values())
    assert time.monotonic() - started < 60, "it was tried once"


def test_a_process_that_somebody_ends_says_nothing_of_its_kernel(monkeypatch):
    from kernels import workers

    monkeypatch.setattr(workers._Worker, "ask", lambda self, case: self._process.kill() or self._answer(9))
    (found,) = dict(judged("composed", [CASE], Conditions(CPU))).values()
    assert found == {"right": False, "why": "died by SIGKILL (out of memory?)", "passing": True}


def test_a_process_that_cannot_be_ended_is_left_behind(monkeypatch):
    from kernels import workers

    worker = workers._Worker("composed", Conditions(CPU))
    real, waits = worker._process.wait, []

    def stuck(timeout=None):
        waits.append(timeout)
        raise subprocess.TimeoutExpired("it", timeout)

    monkeypatch.setattr(worker._process, "wait", stuck)
    worker.close()
    assert waits == [10]
    real(timeout=10)


def test_no_case_begins_after_the_deadline():
    assert list(judged("composed", [CASE], Conditions(CPU), deadline=time.monotonic() - 1)) == []


# -- decisions --------------------------------------------------------------------------------------------------------


def timed(ms: float, mib: float = 10.0) -> dict:
    return RIGHT | {"ms": ms, "mib": mib}


WRONG = {"right": False, "why": "wrong dp"}


@pytest.mark.parametrize(
    ("found", "route"),
    [
        ({"triton": RIGHT}, "triton"),
        ({"triton": timed(2), "compiled": timed(1)}, "compiled"),
        ({"triton": timed(2), "compiled": timed(1.9)}, "triton"),  # not clearly faster
        ({"triton": timed(2, 10), "compiled": timed(1, 100)}, "triton"),  # not for so much memory
        ({"triton": WRONG, "compiled": timed(1, 900), "composed": timed(2, 900)}, "compiled"),
        ({"triton": WRONG, "triton-tiled": timed(1.5), "compiled": WRONG, "composed": timed(2)}, "triton-tiled"),
        ({"triton": WRONG, "triton-tiled": WRONG, "composed": RIGHT}, "composed"),
        ({"triton": WRONG, "composed": WRONG}, None),
    ],
)
def test_a_group_takes_the_fastest_right_route(found, route):
    (decision,) = decide([CASE], {CASE: found})
    assert decision.route == route
    assert bool(decision.wrong) == (found["triton"] is WRONG)


def test_time_on_the_gpu_decides_where_calls_are_replayed():
    ours, other = timed(3) | {"gpu_ms": 1.0}, timed(2) | {"gpu_ms": 1.5}  # many small launches against few
    results = {CASE: {"triton": ours, "compiled": other}}
    assert decide([CASE], results)[0].route == "triton"
    assert decide([CASE], results, replayed=False)[0] == Decision((CASE,), "compiled", ms=(3.0, 2.0))
    del other["gpu_ms"]  # one that could not be captured
    assert decide([CASE], results)[0].route == "compiled"


BUSY = {"right": False, "why": "a process for it could not start: devices are busy", "passing": True}


def test_where_nothing_can_be_checked_the_composed_form_runs_and_strict_refuses():
    nothing = dict.fromkeys(("triton", "triton-tiled", "composed", "compiled"), BUSY)
    (decision,) = decide([CASE], {CASE: nothing})
    assert decision.route == "composed"
    assert decision.line == (
        f"KERNELS COULD NOT BE CHECKED ON THIS MACHINE: {CASE}: triton: {BUSY['why']}; composed runs instead"
    )
    refuse([decision], strict=False)
    with pytest.raises(WrongKernelsError, match=r"kernels\.strict forbids: set it to false, or free the GPU"):
        refuse([decision], strict=True)
    (decision,) = decide([CASE], {CASE: nothing | {"composed": WRONG}})
    assert decision.route is None, "that is a finding"
    (decision,) = decide([CASE, LARGER], {CASE: nothing, LARGER: nothing | {"triton": WRONG}})
    assert "WRONG ON THIS" in decision.line


@pytest.mark.parametrize("search", [True, False])
def test_a_faster_route_is_looked_for_where_that_is_wanted(tmp_path, monkeypatch, search):
    from kernels import check as module

    asked = []

    def right(route, cases, *_):
        asked.extend([route] * len(list(cases)))
        return [(case, RIGHT) for case in cases]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "machine", lambda *_: machine(CPU))
    monkeypatch.setattr(module, "judged", right)
    module.check([CASE], torch.device("cuda:0"), search=search)
    assert asked == (["triton", "composed", "compiled"] if search else ["triton"])


def test_cases_of_a_group_share_a_route_and_groups_do_not():
    results = {
        CASE: {"triton": RIGHT},
        LARGER: {"triton": WRONG, "composed": RIGHT},
        OTHER: {"triton": RIGHT},
    }
    first, second = decide([CASE, LARGER, OTHER], results)
    assert first.route is None, "composed was not judged for the first case"
    results[CASE]["composed"] = RIGHT
    first, second = decide([CASE, LARGER, OTHER], results)
    assert (first.cases, first.route, second.route) == ((CASE, LARGER), "composed", "triton")
    assert first.wrong == ((LARGER, "wrong dp"),)
    assert choices([first, second]) == {CASE: "composed", LARGER: "composed", OTHER: "triton"}


def test_what_is_refused():
    nothing = Decision((CASE,), None, ((CASE, "timed out after 9 s"),))
    replaced = Decision((CASE,), "composed", ((CASE, "wrong dp"), (LARGER, "wrong dx")))
    faster = Decision((CASE,), "compiled", ms=(2.0, 1.0))
    refuse([faster, replaced], strict=False)
    refuse([faster], strict=True)
    assert "(and 1 more)" in replaced.line
    assert faster.line == f"kernels: {CASE}: compiled runs, 1.00 ms instead of 2.00"
    with pytest.raises(WrongKernelsError, match="timed out after 9 s; nothing else is right"):
        refuse([nothing], strict=False)
    with pytest.raises(WrongKernelsError, match=r"wrong dp; composed would run instead, which kernels\.strict forbids"):
        refuse([replaced], strict=True)


def test_only_narrow_attention_has_a_tiled_route():
    assert "triton-tiled" in possible(CASE)
    assert "triton-tiled" not in possible(AttentionCase(1, 256, 3, 4, 8, 2, "float32"))
    assert "triton-tiled" not in possible(AGGREGATION)


# -- files and arguments ----------------------------------------------------------------------------------------------


@pytest.fixture
def verdict(tmp_path, monkeypatch):
    """Opens the findings of this machine in a cache folder of the test: (verdict, lines told)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told: list[str] = []
    return lambda **options: (Verdict(machine(CPU), told.append, **options), told)


def test_findings_are_kept_by_machine(verdict, monkeypatch):
    first, told = verdict()
    first.add(CASE, "triton", WRONG | {"error": 7.0})
    first.add(AGGREGATION, "triton", RIGHT)
    first.add(OTHER, "triton", {"right": False, "why": "out of memory", "passing": True})
    again, _ = verdict()
    assert again.results == {CASE: {"triton": WRONG | {"error": 7.0}}, AGGREGATION: {"triton": RIGHT}}
    assert verdict(again=True)[0].results == {}
    kind = machine(CPU)
    assert kind.keys() == {"gpu", "driver", "triton", "torch", "source", "environment"}
    for key in kind:
        assert Verdict(kind | {key: "another"}, told.append).results == {}
    assert told == []
    assert [path.parent for path in cache_folder().iterdir()] == [cache_folder()], "one file, no leftovers"


@pytest.mark.parametrize("name", ["TRITON_PTXAS_PATH", "TRITON_DEFAULT_FP_FUSION", "NVIDIA_TF32_OVERRIDE"])
def test_findings_belong_to_the_settings_of_compilers(verdict, monkeypatch, name):
    verdict()[0].add(CASE, "triton", RIGHT)
    monkeypatch.setenv(name, "0")
    assert verdict()[0].results == {}


def test_two_processes_that_write_keep_both_findings(verdict):
    (one, _), (two, _) = verdict(), verdict()
    one.add(CASE, "triton", RIGHT)
    two.add(CASE, "composed", RIGHT)
    two.add(OTHER, "triton", RIGHT)
    assert verdict()[0].results == {CASE: {"triton": RIGHT, "composed": RIGHT}, OTHER: {"triton": RIGHT}}


@pytest.mark.parametrize("damage", ["truncated", "binary", "foreign", "no boolean", "no reason", "a list"])
def test_a_damaged_or_foreign_file_is_told_and_made_again(verdict, damage):
    whole, _ = verdict()
    whole.add(CASE, "triton", WRONG)
    content = json.loads(whole.path.read_text())
    finding = content["findings"][0]["routes"]["triton"]
    if damage == "truncated":
        whole.path.write_text(whole.path.read_text()[:60])
    elif damage == "binary":
        whole.path.write_bytes(b"\xff\x00\xfe")
    else:
        if damage == "foreign":
            content["machine"]["driver"] = "another"
        elif damage == "no boolean":
            finding["right"] = "yes"
        elif damage == "no reason":
            del finding["why"]
        whole.path.write_text(json.dumps([] if damage == "a list" else content))
    again, told = verdict()
    assert again.results == {}
    (line,) = told
    assert line.startswith(f"kernels: {whole.path} is not used, and made again: ")
    again.add(CASE, "triton", WRONG)
    assert verdict()[0].results == {CASE: {"triton": WRONG}}


def test_a_folder_that_cannot_be_written_is_told_once(verdict, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    found, told = verdict()
    told.clear()
    found.add(CASE, "triton", RIGHT)
    found.add(OTHER, "triton", RIGHT)
    (line,) = told
    assert "cannot be written" in line
    assert found.results.keys() == {CASE, OTHER}


def test_without_a_home_nothing_is_kept_and_that_is_told(verdict, monkeypatch, tmp_path):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.chdir(tmp_path)
    found, told = verdict()
    found.add(CASE, "triton", RIGHT)
    assert told == [
        "kernels: there is no folder for findings (Could not determine home directory.): the next run checks again"
    ]
    assert (found.results, list(tmp_path.iterdir())) == ({CASE: {"triton": RIGHT}}, [])


def test_processes_of_two_hosts_write_different_files(verdict, monkeypatch):
    from kernels import verdict as module

    replaced = []
    monkeypatch.setattr(module.os, "replace", lambda source, _: replaced.append(Path(source).name))
    for host in ("a", "b"):
        monkeypatch.setattr(module.socket, "gethostname", lambda host=host: host)
        verdict()[0].add(CASE, "triton", RIGHT)
    assert len(set(replaced)) == 2


def test_a_machine_without_gpu_is_told_in_one_line_with_status_2(tmp_path):
    status, out, error = command(tmp_path, interpret="0")
    assert (status, error) == (2, "")
    assert len(out.splitlines()) == 1
    assert out.startswith("no GPU here") or not TRITON_INSTALLED


@needs_triton
def test_unusable_cases_end_with_status_2(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    status, out, error = command(tmp_path, "--cases", str(tmp_path / "bad.json"))
    assert (status, out) == (2, "")
    assert error.startswith(f"error: {tmp_path}/bad.json: ")


@pytest.mark.parametrize("case", [CASE, AGGREGATION, AttentionCase(2, 8, 3, 4, 4, 2, "float16", "channels_last")])
def test_cases_travel_as_json(case):
    assert read_cases(json.dumps([case_to_json(case)]), "here") == [case]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"operation": "convolution"}, "attention or aggregation"),
        ({"head": 3}, "attention case: head: unknown or missing"),
        ({"heads": 3}, "heads and groups divide channels"),
        ({"batch": 0}, "positive whole numbers"),
        ({"width": 2.5}, "positive whole numbers"),
        ({"dtype": "int8"}, "dtype is one of float32"),
        ({"layout": "NHWC"}, "layout NCHW or channels_last"),
    ],
)
def test_an_unusable_case_is_named(changes, told):
    with pytest.raises(ValueError, match=told):
        case_from_json(case_to_json(CASE) | changes)


@pytest.mark.parametrize("levels", [[], [[0, 2]], [3], "ab"])
def test_unusable_levels_are_named(levels):
    with pytest.raises(ValueError, match="aggregation case: "):
        case_from_json(case_to_json(AGGREGATION) | {"levels": levels})
