"""`sharpprior experiment`: arms that are compared, run to the end and written up."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from train.cli.console import say

app = typer.Typer()


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help="Of a file of configs/experiments, or a YAML file.")],
    photos: Annotated[
        Path | None,
        typer.Option(help="Folder with train/ and val/: pictures or shard sets, in place of the configuration's."),
    ] = None,
    root: Annotated[Path, typer.Option(help="Folder of the runs, in a folder of the experiment's name.")] = Path(
        "runs/experiments"
    ),
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the report.")] = Path("docs/experiments"),
    arms: Annotated[list[str] | None, typer.Option("--arm", help="These arms alone (and what they take).")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="These seeds alone.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key in all runs.")
    ] = None,
    only_report: Annotated[bool, typer.Option("--report", help="Write up what is there, run nothing.")] = False,
    only_list: Annotated[bool, typer.Option("--list", help="Name the runs and what became of them.")] = False,
    to_slurm: Annotated[
        bool, typer.Option("--submit", help="Hand the runs to SLURM, a job each; score them here later.")
    ] = False,
) -> None:
    """Run all arms of an experiment with all seeds, go on where it was broken off, and write docs/experiments/NAME.md.

    The report is written anew after every run. A run that is there with other settings is an error, never counted.
    """
    from train.experiments.plan import load_experiment, trials
    from train.experiments.report import gather, write_report
    from train.experiments.runner import finished, held, make, submit

    name, plan = load_experiment(name)
    unknown = set(arms or ()) - set(plan.arms)
    if unknown:
        raise ValueError(f"--arm {', '.join(sorted(unknown))}: no such arm; there are {', '.join(plan.arms)}")
    root = (root / name).absolute()
    # Looking does not wait for the process that runs.
    with contextlib.nullcontext() if only_list or only_report else held(root):
        data = _data_of(photos, root) if photos is not None else {}
        every = list(trials(plan, root, data=data, overrides=overrides or ()))
        needed = {trial.needs for trial in every if arms is None or trial.arm in arms}
        wanted = [
            trial
            for trial in every
            if (trial.name in needed if trial.arm in plan.first else arms is None or trial.arm in arms)
            and (seeds is None or trial.seed in seeds or trial.arm in plan.first)
        ]
        if only_list:
            for trial in wanted:
                there = trial.needs is None or any(t.name == trial.needs and finished(t) for t in every)
                state = "finished" if there and finished(trial) else "to do"
                say(f"{trial.name}: {state}")
            return
        report = out / f"{name}.md"
        if to_slurm:
            ready = {trial.name for trial in every if trial.needs is None and finished(trial)}
            waiting = [trial for trial in wanted if trial.needs is not None and trial.needs not in ready]
            done = ready | {t.name for t in wanted if t.needs is not None and t not in waiting and finished(t)}
            jobs = submit([trial for trial in wanted if trial.name not in done])
            for run, job in jobs.items():
                say(f"{run}: job {job}")
            say("when they are done, the same command without --submit scores them and writes the report")
            return
        for trial in () if only_report else wanted:
            make(trial, tell=say)
            write_report(report, name, plan, gather(every), len(every))
        write_report(report, name, plan, gather(every), len(every))
    say(f"report: {report}")


def _data_of(photos: Path, root: Path) -> dict[str, str]:
    """Shard sets of a folder's train/ and val/, made once of each state of its pictures; no picture may be in both."""
    from data.shards.set import ShardSet
    from data.shards.tar import INDEX
    from train.experiments.leak import check_no_leak

    sets = {}
    for part in ("train", "val"):
        source = (photos.expanduser() / part).absolute()
        if not source.is_dir():
            raise ValueError(f"{source}: no such folder: --photos needs train/ and val/")
        sets[part] = source if (source / INDEX).is_file() else _shards_of(source, root / "photos")
    opened = [ShardSet(str(path)) for path in sets.values()]
    checked, digests = root / "photos-checked.txt", " ".join(each.digest for each in opened)
    if not checked.is_file() or digests not in checked.read_text():
        nearest = check_no_leak(*opened)
        checked.parent.mkdir(parents=True, exist_ok=True)
        checked.write_text(f"{digests}\nnearest training and validation pictures: {nearest} bits apart\n")
    return {part: str(path) for part, path in sets.items()}


def _shards_of(source: Path, root: Path) -> Path:
    """Shards of a folder's pictures below `root`, in a folder of its own for each state of the pictures."""
    import hashlib
    import subprocess
    import sys

    from data.files import files_below
    from data.shards.tar import INDEX

    state = hashlib.blake2b(str(source).encode(), digest_size=8)
    for path in files_below(source):
        facts = path.stat()
        state.update(f"{path.relative_to(source)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    target = root / f"{source.name}-{state.hexdigest()}"
    if not (target / INDEX).is_file():
        say(f"{source}: making shards of its pictures")
        command = [sys.executable, "-m", "train.cli", "prepare", "folder", str(source), str(target), "--png"]
        if status := subprocess.run(command, check=False).returncode:
            raise ValueError(f"{source}: could not be made into shards (status {status})")
    return target
