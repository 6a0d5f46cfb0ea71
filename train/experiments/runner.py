"""Makes an experiment's runs, one after another, each to its end: a broken-off one goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from model.encoder import weights_digest
from train import ROOT
from train.checkpoint.folder import Checkpoints
from train.checkpoint.manifest import read_state
from train.checkpoint.plug import PARTS
from train.checkpoint.saved import load_model
from train.config.file import load_config
from train.config.identity import deciding, differences
from train.config.schema import Config
from train.config.sources import digest_of, open_sets, with_resolved_data
from train.evaluate.metrics import metric_names
from train.evaluate.results import read_results
from train.experiments.plan import Trial
from train.run.folder import RunFolder

RESULTS = "evaluations/experiment"  # folder in a run's folder, where `sharpprior compare` looks too
BASELINES = "baselines.jsonl"  # file in the experiment's folder, of what its runs' evaluations share


class StoppedError(ValueError):
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
    return _trained(folder, config) and (_scored(folder, trial) or not scores(config))


def make(trial: Trial, *, tell: Callable[[str], None] = print) -> None:
    """Train a run to its last step and score it, from wherever it stands.

    StoppedError where it was stopped in good order, ValueError where it failed: both name its folder.
    """
    config = trial.load()
    folder = RunFolder.of(config)
    if scores(config):
        metric_names("full", trial.also)  # refused now, not after hours of training
    if not _trained(folder, config):
        tell(f"{trial.name}: training")
        status = subprocess.run(training_command(trial), cwd=ROOT, check=False).returncode
        if status:
            raise ValueError(f"{folder.path}: the run failed (status {status}): see its log.txt; then start again")
        if not _trained(folder, config):
            raise StoppedError(f"{folder.path}: stopped before its last step: start the experiment again to go on")
    if scores(config) and not _scored(folder, trial):
        tell(f"{trial.name}: scoring")
        command = [sys.executable, "-m", "train.cli", "evaluate", str(folder.path), "-o", str(folder.path / RESULTS)]
        # Inputs and smoothing are the same for all arms, and so is what is told the kernel, which is dear.
        command += ["--no-deconvolution", "--baselines", str(folder.path.parent / BASELINES)]
        if (folder.path / RESULTS / "results.json").is_file():
            command.append("--overwrite")  # it was scored by fewer metrics
        command += [word for name in trial.also for word in ("--also", name)]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            raise ValueError(f"{folder.path}: could not be scored (status {status}): start again when that is mended")


def _trained(folder: RunFolder, config: Config) -> bool:
    """Whether the last step is done and saved. ValueError where another run is there: other settings, photographs or
    prior."""
    if not (folder.config.is_file() and folder.started()):
        return False
    there = load_config(folder.config)
    apart = differences(deciding(there), deciding(with_resolved_data(config)))
    apart += differences(there.eval.model_dump(), config.eval.model_dump(), "eval.")
    checkpoints = Checkpoints(folder.checkpoints, 1)
    done = config.train.steps in checkpoints.steps()
    if done:
        state = read_state(checkpoints.path(config.train.steps))
        train, val = open_sets(config)
        found = {"training photographs": (state.index_digest, digest_of(train))}
        if val is not None:
            found["validation photographs"] = (state.val_digest, val.digest)
        for part in PARTS:
            if (source := getattr(config.model, f"{part}_from")) is not None:
                taken = (state.origins or {}).get(part, {}).get("digest")
                found[part] = (taken, _part_digest(source, part))
        apart += [name for name, (was, now) in found.items() if was != now]
    if apart:
        raise ValueError(
            f"{folder.path}: holds a run with other settings ({'; '.join(apart[:3])}): choose another --root, or "
            "delete that folder"
        )
    return done


@functools.cache
def _part_digest(path: str, part: str) -> str:
    """Of the weights of a saved prior or backbone, as a run's checkpoints record it of the one that it took."""
    return weights_digest(getattr(load_model(path, torch.device("cpu"))[0], part))


def _scored(folder: RunFolder, trial: Trial) -> bool:
    """Whether every picture was scored, by all metrics that are asked for. ValueError where some could not be."""
    file = folder.path / RESULTS / "results.json"
    if not file.is_file():
        return False
    results = read_results(file)
    if set(trial.also) - set(results["metrics"]):
        return False
    if failed := results["failed"]:
        raise ValueError(f"{file}: {len(failed)} pictures could not be scored, first {failed[0]['key']}: mend the set")
    return True


def scores(config: Config) -> bool:
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
        # The script takes the configuration, then arguments of train/main.py, and the run's folder by environment; it
        # resumes by itself.
        own = [each for each in trial.settings if not each.startswith(("run.root=", "run.name="))]
        settings = [word for setting in own for word in ("--set", setting)]
        command = ["sbatch", "--parsable", f"--job-name={trial.name}", *waits, script, trial.config, *settings]
        run = load_config(trial.config, trial.settings).run
        place = {"RUN_ROOT": str(Path(run.root).absolute()), "RUN_NAME": run.name}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | place, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"sbatch refused {trial.name}: {done.stderr.strip()}")
        jobs[trial.name] = done.stdout.strip().split(";")[0]
    return jobs
