"""Makes an experiment's runs, one after another, each to its end: a broken-off one goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from train import ROOT
from train.checkpoint.folder import Checkpoints
from train.config.file import load_config
from train.config.identity import deciding
from train.config.schema import Config
from train.config.sources import with_resolved_data
from train.experiments.plan import Trial
from train.run.folder import RunFolder

RESULTS = "evaluation"  # folder in a run's folder


class StoppedError(Exception):
    """A run was asked to stop before its end; given again, the experiment goes on there."""


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Hold an experiment's folder. ValueError if another process works on it."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{root}: another process works on this experiment: wait, or stop it") from None
        yield


def finished(trial: Trial) -> bool:
    """Whether a run has done its last step and was scored. ValueError where its folder holds a run with other
    settings: nothing of another experiment is ever counted as this one's."""
    folder, config = RunFolder.of(trial.load()), trial.load()
    return _trained(folder, config) and (_scored(folder) or not _scores(config))


def make(trial: Trial, *, tell: Callable[[str], None] = print) -> None:
    """Train a run to its last step and score it, from wherever it stands.

    StoppedError where it was stopped in good order, ValueError where it failed: both name its folder.
    """
    config = trial.load()
    folder = RunFolder.of(config)
    if not _trained(folder, config):
        tell(f"{trial.name}: training")
        status = subprocess.run(training_command(trial), cwd=ROOT, check=False).returncode
        if status:
            raise ValueError(f"{folder.path}: the run failed (status {status}): see its log.txt; then start again")
        if not _trained(folder, config):
            raise StoppedError(f"{folder.path}: stopped before its last step: start the experiment again to go on")
    if _scores(config) and not _scored(folder):
        tell(f"{trial.name}: scoring")
        command = [sys.executable, "-m", "train.cli", "evaluate", str(folder.path), "-o", str(folder.path / RESULTS)]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            raise ValueError(f"{folder.path}: could not be scored (status {status}): start again when that is mended")


def _trained(folder: RunFolder, config: Config) -> bool:
    """Whether the last step is done and saved."""
    if not (folder.config.is_file() and folder.started()):
        return False
    if deciding(with_resolved_data(config)) != deciding(load_config(folder.config)):
        raise ValueError(
            f"{folder.path}: holds a run with other settings: choose another --root, or delete that folder"
        )
    return config.train.steps in Checkpoints(folder.checkpoints, 1).steps()


def _scored(folder: RunFolder) -> bool:
    return (folder.path / RESULTS / "results.json").is_file()


def _scores(config: Config) -> bool:
    """Whether a run restores anything: one that only distills does not."""
    return config.eval.enabled and config.train.distill_steps < config.train.steps


def training_command(trial: Trial) -> list[str]:
    """The command that trains a run, or goes on with it."""
    command = [sys.executable, "train/main.py", "--config", trial.config, "--resume", "auto"]
    for setting in trial.settings:
        command += ["--set", setting]
    return command


def submit(trials: Sequence[Trial], *, script: str = "slurm/train_multinode.sh") -> dict[str, str]:
    """Hand runs to SLURM, a job each; a run that takes another's prior waits for its end. Job ids by run.

    ValueError where sbatch refuses.
    """
    jobs: dict[str, str] = {}
    for trial in trials:
        waits = [f"--dependency=afterok:{jobs[trial.needs]}"] if trial.needs in jobs else []
        name = ["--parsable", f"--job-name={trial.name}", *waits]
        _, _, *rest = training_command(trial, ("", ""))
        config = rest.pop(1)
        rest.pop(0)
        done = subprocess.run(
            ["sbatch", *name, script, config, *rest], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ValueError(f"sbatch refused {trial.name}: {done.stderr.strip()}")
        jobs[trial.name] = done.stdout.strip().split(";")[0]
    return jobs
