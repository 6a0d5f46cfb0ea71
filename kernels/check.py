"""Are the kernels right on this GPU? Every case forward and backward against fp64, each route in its own process.

    python -m kernels.check                                        # typical cases
    python -m kernels.check --config configs/large.yaml --ranks 8  # those that a training run will call
    python -m kernels.check --cases FILE                           # a JSON list of cases (- reads it from stdin)

Exit status: 0, all are right on the launch table; 1, one was replaced or nothing is right; 2, unusable arguments or no
GPU. Findings are kept (kernels/verdict.py), so a second call costs a file read; --again makes them anew. With
TRITON_INTERPRET=1 the kernels run in Triton's interpreter on the CPU, small ones, and never in bfloat16, which it
computes wrongly. A training run does the same for its own cases before its first step (`kernels.check` in its
configuration).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.attention.configs import BY_ARCHITECTURE, GENERAL, tile_width
from kernels.routes import (
    DEFAULT,
    ROUTES,
    AggregationCase,
    AttentionCase,
    Case,
    case_from_json,
    case_to_json,
)
from kernels.runtime import INTERPRETING, TRITON_INSTALLED
from kernels.verdict import Results, Verdict, machine
from kernels.workers import ROOT, Conditions, judged

# Names a module that the judging processes import first: tests break kernels with it.
PRELOAD = "SHARPPRIOR_CHECK_PRELOAD"
BUDGET_S = 60.0
# A right launch table gives way to a faster route only where that is clearly faster, and costs next to no memory.
FASTER, EXTRA_MIB = 0.9, 64.0


class WrongKernelsError(ValueError):
    """No route is right, or `strict` allows no other than the launch table."""


@dataclass(frozen=True)
class Decision:
    """The route of a group of cases. route None: no route is right. wrong: (case, why) of the launch table. trouble:
    none of that says anything of the kernel (a GPU that others hold, no memory left). ms: of all the group's cases by
    the launch table and by the route, where both were timed."""

    cases: tuple[Case, ...]
    route: str | None
    wrong: tuple[tuple[Case, str], ...] = ()
    ms: tuple[float, float] | None = None
    trouble: bool = False

    @property
    def line(self) -> str:
        """What to tell; empty where the launch table runs, as it should."""
        if self.wrong:
            case, why = self.wrong[0]
            more = f" (and {len(self.wrong) - 1} more)" if len(self.wrong) > 1 else ""
            runs = "nothing else is right" if self.route is None else f"{self.route} runs instead"
            said = "COULD NOT BE CHECKED" if self.trouble else "WRONG"
            return f"KERNELS {said} ON THIS MACHINE: {case}{more}: {DEFAULT}: {why}; {runs}"
        if self.route != DEFAULT and self.ms is not None:
            return f"kernels: {self.cases[0]}: {self.route} runs, {self.ms[1]:.2f} ms instead of {self.ms[0]:.2f}"
        return ""


def check(
    cases: Iterable[Case],
    device: torch.device,
    *,
    strict: bool = False,
    budget_s: float = BUDGET_S,
    search: bool = True,
    replayed: bool = True,
    limit_s: float = 240.0,
    again: bool = False,
    tell: Callable[[str], None] = print,
    on_result: Callable[[Case, str, dict[str, Any]], None] = lambda case, route, result: None,
    alive: Callable[[], None] = lambda: None,
) -> list[Decision]:
    """Judge what is not yet known of the cases, and decide the route of each group.

    The launch table is always judged, and where it is wrong every other route. On a GPU something faster is looked for
    too with `search`: no case of that begins after `budget_s` seconds. What is known to be faster is taken either way.

    replayed: the calls will be replayed as CUDA graphs, so the GPU's time decides and not the gaps between launches.
    tell: takes lines for people. on_result: called with every finding, the known ones first. alive: called every
    second. again: nothing is known. limit_s: of one case, compilation included. Raises WrongKernelsError where no route
    of a group is right, and with `strict` where the launch table is not.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    cases = list(dict.fromkeys(cases))
    if skipped := [case for case in cases if INTERPRETING and case.dtype == "bfloat16"]:
        tell(f"kernels: {len(skipped)} bfloat16 cases are not judged: Triton's interpreter computes it wrongly")
        cases = [case for case in cases if case not in skipped]
    preload = os.environ.get(PRELOAD)
    verdict = Verdict(machine(device, preload), tell, again=again)
    conditions = Conditions(device, timed=device.type == "cuda", limit_s=limit_s, preload=preload, alive=alive)
    for case in cases:
        for route, result in verdict.results.get(case, {}).items():
            on_result(case, route, result)

    def run(route: str, wanted: Sequence[Case], deadline: float | None = None) -> None:
        new = [c for c in wanted if route not in verdict.results.get(c, {}) and route in possible(c)]
        for case, result in judged(route, new, conditions, deadline):
            verdict.add(case, route, result)
            on_result(case, route, result)

    run(DEFAULT, cases)
    failing = {case.group for case in cases if not verdict.results[case][DEFAULT]["right"]}
    for route in ROUTES[1:]:
        if route != "compiled" or device.type == "cuda":
            run(route, [case for case in cases if case.group in failing])
    if device.type == "cuda" and search:
        deadline = time.monotonic() + budget_s
        for route in ("composed", "compiled"):
            run(route, [case for case in cases if case.group not in failing], deadline)
    decisions = decide(cases, verdict.results, replayed=replayed)
    for each in decisions:
        if each.line and not (strict and each.wrong) and each.route is not None:
            tell(each.line)
    refuse(decisions, strict=strict)
    return decisions


def possible(case: Case) -> tuple[str, ...]:
    """Routes that differ for a case: only narrow attention has fused kernels to do without."""
    widest = max(max(rows, default=0) for table in (GENERAL, *BY_ARCHITECTURE.values()) for rows in _fused(table))
    if isinstance(case, AttentionCase) and max(tile_width(case.channels), tile_width(case.prior)) <= widest:
        return ROUTES
    return tuple(route for route in ROUTES if route != "triton-tiled")


def _fused(table: dict) -> list[dict]:
    return [rows for (kernel, _), rows in table.items() if kernel in ("gram", "gradient")]


def decide(cases: Iterable[Case], results: Results, *, replayed: bool = True) -> list[Decision]:
    """The route of each group: the launch table where it is right and nothing is clearly faster, else the fastest right
    one (by the sum of its cases; in the order of ROUTES where they were not timed). The composed form where nothing
    could be checked. replayed: by the time of CUDA graphs, where all right routes have it."""
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    decisions = []
    for members in groups.values():
        found = {route: [results.get(case, {}).get(route, {}) for case in members] for route in ROUTES}
        right = [route for route in ROUTES if all(each.get("right") for each in found[route])]
        timed = [r for r in right if all("ms" in e for e in found[r])]
        kind = "gpu_ms" if replayed and all("gpu_ms" in e for r in timed for e in found[r]) else "ms"
        ms = {r: sum(e[kind] for e in found[r]) for r in timed}
        wrong = tuple(
            (case, each["why"]) for case, each in zip(members, found[DEFAULT], strict=True) if not each["right"]
        )
        if wrong:
            passing = {r: all(e.get("right") or e.get("passing") for e in found[r] if e) for r in ROUTES}
            route = min(right, key=lambda r: ms.get(r, float("inf")), default=None)
            if route is None and all(passing.values()):
                route = "composed"  # plain PyTorch, against which nothing was found
            decisions.append(Decision(tuple(members), route, wrong, trouble=passing[DEFAULT]))
            continue
        peak = {r: max(e.get("mib", float("inf")) for e in found[r]) for r in ms}
        small = [r for r in ms if r == DEFAULT or peak[r] <= peak[DEFAULT] + EXTRA_MIB]
        best = min(small, key=lambda r: ms[r], default=DEFAULT)
        if best != DEFAULT and ms[best] <= FASTER * ms[DEFAULT]:
            decisions.append(Decision(tuple(members), best, ms=(ms[DEFAULT], ms[best])))
        else:
            decisions.append(Decision(tuple(members), DEFAULT))
    return decisions


def refuse(decisions: Sequence[Decision], *, strict: bool) -> None:
    """WrongKernelsError where a group has no right route, and with `strict` where one was replaced."""
    for each in decisions:
        if each.route is None:
            raise WrongKernelsError(
                f"{each.line}: this machine cannot compute it; update Triton or the driver (kernels.check false would "
                "run it unchecked)"
            )
        if strict and each.wrong:
            raise WrongKernelsError(
                f"{each.line.replace('runs instead', 'would run instead')}, which kernels.strict forbids: set it to "
                f"false, or {'free the GPU' if each.trouble else 'update Triton or the driver'}"
            )


def choices(decisions: Iterable[Decision]) -> dict[Case, str]:
    """For `kernels.routes.use`."""
    return {case: each.route for each in decisions if each.route is not None for case in each.cases}


# -- the command ------------------------------------------------------------------------------------------------------


def typical_cases() -> list[Case]:
    """Widths of a U-Net's levels on crops of 256 px, both layouts; in the interpreter two small ones."""
    if INTERPRETING:
        return [
            AttentionCase(1, 24, 6, 7, 16, 2, "float32"),
            AggregationCase(1, 8, 5, 4, 2, ((3, 2), (2, 2)), "float32"),
        ]
    cases: list[Case] = []
    for layout in ("NCHW", "channels_last"):
        for dtype in ("bfloat16", "float16", "float32"):
            for channels, side in (
                (32, 128),
                (48, 128),
                (64, 64),
                (96, 64),
                (128, 64),
                (256, 32),
                (384, 16),
                (512, 16),
            ):
                for prior in (64, 128):
                    cases.append(AttentionCase(2, channels, side, side, prior, 4, dtype, layout, layout))
            levels = ((64, 64), (32, 32), (16, 16), (8, 8))
            cases += [AggregationCase(2, 64, side, side, 4, levels, dtype, layout) for side in (128, 64, 32)]
    return cases


def cases_of_run(config: Path, overrides: Sequence[str], ranks: int, device: str) -> list[Case]:
    """The cases of a training run, which `sharpprior kernels` lists: its networks are not known here."""
    command = [sys.executable, "-m", "train.cli", "kernels", "--config", str(config.resolve()), "--device", device]
    command += ["--ranks", str(ranks), *(part for each in overrides for part in ("--set", each))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError((done.stderr.strip() or done.stdout.strip()).removeprefix("error: "))
    return read_cases(done.stdout.strip().splitlines()[-1], str(config))


def read_cases(text: str, source: str) -> list[Case]:
    """Cases of a JSON list; ValueError naming the source."""
    try:
        given = json.loads(text)
        if not isinstance(given, list):
            raise ValueError("expected a list of cases")
        return [case_from_json(each) for each in given]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", type=Path, help="configuration of a run")
    source.add_argument("--cases", help="JSON file of cases, - for stdin")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of --config")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of the run (its batch is divided among them)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all findings and choices, replaced as they come")
    parser.add_argument("--strict", action="store_true", help="refuse to replace a wrong launch")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="for what may be faster")
    parser.add_argument("--limit", type=float, default=240.0, metavar="SECONDS", help="for one case, then it hangs")
    parser.add_argument("--eager", action="store_true", help="of a run without CUDA graphs: launch gaps count")
    parser.add_argument("--again", action="store_true", help="use no findings of earlier calls")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """The command; its exit status."""
    args = _arguments(given)
    if not TRITON_INSTALLED or not (INTERPRETING or torch.cuda.is_available()):
        missing = "GPU" if TRITON_INSTALLED else "Triton"
        print(f"no {missing} here: nothing was checked (TRITON_INTERPRET=1 runs the kernels on the CPU)", flush=True)
        return 2
    device = torch.device("cpu" if INTERPRETING else f"cuda:{torch.cuda.current_device()}")
    try:
        if args.config:
            cases = cases_of_run(args.config, args.set, args.ranks, device.type)
        elif args.cases:
            cases = read_cases(sys.stdin.read() if args.cases == "-" else Path(args.cases).read_text(), args.cases)
        else:
            cases = typical_cases()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    rows: list[dict[str, Any]] = []

    def write(decisions: Sequence[Decision] = ()) -> None:
        if args.json is not None:
            taken = [{"cases": [str(c) for c in each.cases], "route": each.route} for each in decisions]
            temporary = args.json.with_name(f"{args.json.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps({"findings": rows, "choices": taken}, indent=1), encoding="utf-8")
            temporary.replace(args.json)

    def show(case: Case, route: str, result: dict[str, Any]) -> None:
        rows.append({"case": case_to_json(case), "route": route} | result)
        timing = f" {result['ms']:.3f} ms {result['mib']:.0f} MiB" if "ms" in result else ""
        timing += f" ({result['gpu_ms']:.3f} ms replayed)" if "gpu_ms" in result else ""
        verdict = "right" if result["right"] else f"WRONG: {result['why']}"
        print(f"{case}: {route}: {verdict}{timing}", flush=True)
        write()

    options = {"budget_s": args.budget, "limit_s": args.limit, "again": args.again, "replayed": not args.eager}
    try:
        decisions = check(
            cases, device, strict=args.strict, on_result=show, tell=lambda line: print(line, flush=True), **options
        )
    except WrongKernelsError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    write(decisions)
    return int(any(each.wrong for each in decisions))


if __name__ == "__main__":
    sys.exit(main())
