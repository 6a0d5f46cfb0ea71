"""Kill a training run with SIGKILL again and again, and see whether it ends as if nothing had happened.

python tests/studies/kill_often.py --kills 20 --seed 0 --ranks 2

Moments: anywhere between start and end by the clock, in training, and inside a save (aimed at by watching for its
unfinished folder). Whom: all processes at once, or the main process alone while its loader workers live on. After each
kill every checkpoint that has its name must be whole, and the next start must go on from the newest; in the end every
step is in metrics.jsonl once, and losses and weights are those of the unbroken run, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from tests.train.runs import Runs
from tests.train.weights import assert_same_weights
from train.checkpoint.folder import Checkpoints
from train.checkpoint.manifest import damage

MOMENTS = ("clock", "training", "saving")
SETTINGS = {"train__steps": 24, "train__distill_steps": 4, "checkpoint__every": 2}
LONGEST_S = 240.0  # until a moment that was aimed at must have come


@dataclass
class Killed:
    """What a run went through: one line a kill, and how many of them hit a save."""

    lines: list[str] = field(default_factory=list)
    in_saves: int = 0


def start(runs: Runs, name: str, ranks: int, settings: dict) -> subprocess.Popen:
    """The run, going on from where it stands; its output goes to a file, which cannot fill up."""
    out = open(runs.root / f"{name}.out", "a")  # noqa: SIM115 (the child has it)
    return subprocess.Popen(
        runs.command(name, "--resume", "auto", ranks=ranks, **settings),
        cwd=Path(__file__).parents[2], env=runs.environment(), stdout=out, stderr=out, start_new_session=True,
    )  # fmt: skip


def await_moment(process: subprocess.Popen, folder: Path, moment: str, chance: random.Random) -> bool:
    """Wait for a moment of the kind; False where the run ended before it."""
    deadline = time.monotonic() + LONGEST_S
    if moment == "clock":
        deadline = time.monotonic() + chance.uniform(0.5, 15.0)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        return process.poll() is None
    metrics = folder / "metrics.jsonl"
    length = metrics.stat().st_size if metrics.exists() else 0
    wanted = chance.randint(1, 3)  # the how manieth save or step that it sees
    seen: set[str] = set()
    while process.poll() is None and time.monotonic() < deadline:
        if moment == "saving":
            seen |= {path.name for path in (folder / "checkpoints").glob("step-*.tmp")}
            if len(seen) >= wanted:
                time.sleep(chance.uniform(0, 0.12))
                return process.poll() is None
        elif metrics.exists() and metrics.stat().st_size != length:
            length = metrics.stat().st_size
            wanted -= 1
            if wanted <= 0:
                time.sleep(chance.uniform(0, 0.3))
                return process.poll() is None
        time.sleep(0.002)
    assert process.poll() is not None, f"no moment of {moment} came in {LONGEST_S:.0f} s"
    return False


def kill(process: subprocess.Popen, whole: bool) -> None:
    """SIGKILL to the process, and to all that it started where `whole`; then wait until the killed ones are gone."""
    family = psutil.Process(process.pid).children(recursive=True) if whole else []
    os.kill(process.pid, signal.SIGKILL)
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=30)


def torment(
    runs: Runs, name: str, kills: int, chance: random.Random, ranks: int, settings: dict, moments: tuple[str, ...]
) -> Killed:
    """Kill the run `name` so often (fewer where it ends before), checking after each; then let it end."""
    folder, told = runs.folder(name), Killed()
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    for number in range(kills):
        newest, starts = max(checkpoints.steps(), default=0), len(resumed_at(folder))
        moment = moments[number % len(moments)]
        process = start(runs, name, ranks, settings)
        if not await_moment(process, folder, moment, chance):
            process.wait()
            break
        whole = ranks > 1 or chance.random() < 0.7
        kill(process, whole)
        check_continuation(runs, name, newest, starts)
        saving = list(checkpoints.folder.glob("step-*.tmp"))
        told.in_saves += bool(saving)
        for step in checkpoints.steps():
            assert damage(checkpoints.path(step)) is None, damage(checkpoints.path(step))
        inside = f", inside the save of {saving[0].stem}" if saving else ""
        newest = max(checkpoints.steps(), default=0)
        told.lines.append(f"{moment}: {'all' if whole else 'main process'} killed; newest checkpoint {newest}{inside}")
        print(f"kill {number + 1}: {told.lines[-1]}", flush=True)
    newest, starts = max(checkpoints.steps(), default=0), len(resumed_at(folder))
    assert start(runs, name, ranks, settings).wait() == 0, output(runs, name)
    check_continuation(runs, name, newest, starts)
    return told


def output(runs: Runs, name: str) -> str:
    """What the run's processes said, all of them."""
    return (runs.root / f"{name}.out").read_text()


def resumed_at(folder: Path) -> list[int]:
    """The steps that the run was taken up at, start by start."""
    log = folder / "log.txt"
    return [int(step) for step in re.findall(r"resumed \S+ at step (\d+) of", log.read_text())] if log.exists() else []


def check_continuation(runs: Runs, name: str, newest: int, starts: int) -> None:
    """The last start refused nothing, found nothing torn, and went on from the newest checkpoint (or from one that was
    whole and only waited for its name)."""
    text = output(runs, name)
    for complaint in ("error:", "Traceback", "damaged checkpoint"):
        assert complaint not in text, text[-3000:]
    assert all(step >= max(newest, 1) for step in resumed_at(runs.folder(name))[starts:])


def compare(runs: Runs, name: str, unbroken: str, steps: int) -> None:
    """Every step once, losses and weights those of the unbroken run."""
    recorded = [record["step"] for record in runs.records(name) if "loss" in record]
    assert recorded == list(range(1, steps + 1)), recorded
    assert runs.losses(name) == runs.losses(unbroken)
    assert_same_weights(runs, name, unbroken, steps, tolerance=0)
    checkpoints = runs.folder(name) / "checkpoints"
    left = [path.name for path in checkpoints.iterdir() if not re.fullmatch(r"step-\d+|latest|best", path.name)]
    assert not left, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero", type=int, default=None, help="ZeRO stage; default: 0 on one rank, 2 on more")
    args = parser.parse_args()
    zero = args.zero if args.zero is not None else (0 if args.ranks == 1 else 2)
    settings = SETTINGS | {"engine__zero": zero}
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="kill-often-") as folder:
        runs = Runs(Path(folder))
        runs.run("unbroken", ranks=args.ranks, **settings)
        done = hit = number = 0
        while done < args.kills:
            number += 1
            name = f"killed{number}"
            left = args.kills - done
            moments = tuple(chance.choice(MOMENTS) for _ in range(left))
            told = torment(runs, name, left, chance, args.ranks, settings, moments)
            compare(runs, name, "unbroken", settings["train__steps"])
            done, hit = done + len(told.lines), hit + told.in_saves
            print(f"{name}: as the unbroken run after {len(told.lines)} kills", flush=True)
        print(f"{done} kills, {hit} of them inside a save: always resumed, losses and weights bit for bit")


if __name__ == "__main__":
    main()
