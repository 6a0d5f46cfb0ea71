"""Where a run goes on from: its newest whole checkpoint, here or where the copies are, if going on is the same run.

Free to change when a run goes on: the number of ranks, `train.accumulation`, and of the engine all but `precision` and
`deepspeed`: they decide who computes, and the state is divided anew. What changes the losses is refused: start a run
from the weights with --init.
"""

from __future__ import annotations

import time
from pathlib import Path

from train.checkpoint.far import FarFolder
from train.checkpoint.folder import Checkpoints
from train.checkpoint.manifest import CheckpointError, damage, read_state
from train.config.file import load_config
from train.config.identity import deciding, differences
from train.config.schema import Config
from train.engine.engine import Engine
from train.log import log

DIVIDING = {"zero", "offload", "offload_parameters"}


def look_for_checkpoint(resume: str, checkpoints: Checkpoints, engine: Engine) -> tuple[Path | None, list[str]]:
    """The checkpoint that `--resume` names, or under `auto` the newest whole one of the run's folder, and a line about
    each newer one that is damaged; every rank calls this, and hashes its part of the files. CheckpointError where the
    named one cannot be used."""

    def check(path: Path) -> str | None:
        problems = engine.gather(damage(path, rank=engine.rank, world=engine.world))
        return next((problem for problem in problems if problem is not None), None)

    if resume == "auto":
        steps = engine.gather(checkpoints.steps())[0]  # a shared file system may show others later
        for step in steps:
            wait_for(checkpoints.path(step))
        return checkpoints.newest_whole(check, steps)
    path = Path(resume)
    if not engine.gather(path.exists())[0]:
        raise CheckpointError(f"--resume {resume}: no such checkpoint: name one of a run's, or auto")
    problem = check(path)
    if problem is not None:
        raise CheckpointError(f"{problem}: not a whole checkpoint; name another, or --resume auto")
    return path, []


def wait_for(path: Path, seconds: float = 60.0) -> None:
    """Let a shared file system show a folder that another node has seen; what it does not show is told as missing."""
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)


def find_checkpoint(
    path: Path | None, damaged: list[str], checkpoints: Checkpoints, far: FarFolder | None
) -> Path | None:
    """The checkpoint that was found, or where there is none the newest copy, fetched; on rank 0. CheckpointError where
    what is there cannot be used; None where nothing is."""
    for problem in damaged:
        log.warning("damaged checkpoint, not used: %s", problem)
    if path is None and far is not None:
        path = far.fetch_newest(checkpoints)
        if path is not None:
            log.info("fetched %s from %s", path.name, far.url)
    if path is None and damaged:
        raise CheckpointError(f"{checkpoints.folder}: no whole checkpoint is left ({damaged[0]})")
    if path is None:
        log.info("nothing to resume in %s: starting from the beginning", checkpoints.folder.parent)
    return path


EXTENDED = (
    ("train", "steps"),
    ("optim", "lr"),
    ("optim", "prior_lr_scale"),
    ("optim", "spe_lr_scale"),
    ("optim", "backbone_lr_scale"),
    ("optim", "gate_lr_scale"),
    ("optim", "final_lr"),
    ("optim", "warmup"),
)


def check_fits(path: Path, config: Config, digests: dict[str, str], *, extend: bool = False) -> None:
    """CheckpointError where going on would not be the same run. digests: of the `training` and `validation` data.
    extend: it shall be another run in its number of steps and its learning rates."""
    state = read_state(path)
    for name, was in (("training", state.index_digest), ("validation", state.val_digest)):
        if was != digests[name] and (name == "training" or (was and digests[name])):  # validation may be switched
            raise CheckpointError(f"{path}: the {name} data's index changed since: start a run with --init {path}")
    before, now = deciding(load_config(path / "config.yaml")), deciding(config)
    if extend:
        for section, key in EXTENDED:
            del before[section][key], now[section][key]
        had = load_config(path / "config.yaml").train.steps
        if config.train.steps < had:  # as many are nothing to do, so that a requeued job ends well
            raise CheckpointError(f"--extend {config.train.steps}: the run has {had} steps already: give more")
    differing = sorted(differences(before, now), key=lambda name: not name.startswith("blur.preset"))
    names = {name.partition(" ")[0] for name in differing}
    if "blur.preset" in names:
        was = load_config(path / "config.yaml").blur.preset
        raise CheckpointError(
            f"{path}: the blur's preset was {was}, and is {config.blur.preset} now (another default?): go on with "
            f"--set blur.preset={was}, or start a run with --init {path}"
        )
    if names and names <= {".".join(each) for each in EXTENDED}:
        raise CheckpointError(
            f"{path}: the configuration differs ({', '.join(differing[:4])}): undo that, go on for more steps with "
            f"--extend, or start a run with --init {path}"
        )
    if differing:
        raise CheckpointError(
            f"{path}: the configuration differs ({', '.join(differing[:4])}): undo that, or start a run with "
            f"--init {path}"
        )


def check_computed_alike(path: Path, teacher_digest: str | None, versions: dict[str, str]) -> str | None:
    """CheckpointError where the teacher's weights are no longer those that the run began with; where only packages
    changed, what did, in words."""
    state = read_state(path)
    if state.teacher_digest is not None and state.teacher_digest != teacher_digest:
        raise CheckpointError(
            f"{path}: the teacher's weights are not those that this run began with: put the file of "
            f"model.teacher.weights back, or start a run with --init {path}"
        )
    before = state.versions or versions
    changed = [
        f"{name} {before.get(name)} → {versions.get(name)}" for name in versions if before.get(name) != versions[name]
    ]
    return ", ".join(changed) or None


def divided_anew(path: Path, config: Config, world: int) -> str | None:
    """What is divided otherwise than when the checkpoint was written, in words; None if nothing is."""
    state, before = read_state(path), load_config(path / "config.yaml")
    changed = [f"ranks {state.world} → {world}"] if state.world != world else []
    was, now = ({"engine": each.engine.model_dump(include=DIVIDING)} for each in (before, config))
    changed += differences(was, now)
    if before.train.accumulation != config.train.accumulation:
        changed.append(f"train.accumulation {before.train.accumulation} → {config.train.accumulation}")
    return ", ".join(changed) or None
