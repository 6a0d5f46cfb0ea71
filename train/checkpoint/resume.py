"""Where a run goes on from: its newest whole checkpoint, here or where the copies are, if going on is the same run.

Free to change when a run goes on: the number of ranks, `train.accumulation`, and of the engine all but `precision` and
`deepspeed`: they decide who computes, and the state is divided anew. What changes the losses is refused: start a run
from the weights with --init.
"""

from __future__ import annotations

from pathlib import Path

from train.checkpoint.far import FarFolder
from train.checkpoint.folder import Checkpoints
from train.checkpoint.manifest import CheckpointError, damage, read_state
from train.config.file import load_config
from train.config.identity import deciding, differences
from train.config.schema import Config
from train.log import log

DIVIDING = {"zero", "offload", "offload_parameters"}


def find_checkpoint(resume: str, checkpoints: Checkpoints, far: FarFolder | None) -> Path | None:
    """The checkpoint that `--resume` names, or under `auto` the newest whole one, fetched from the copies where the
    run's folder has none. CheckpointError where what is there cannot be used; None where nothing is."""
    if resume != "auto":
        path = Path(resume)
        problem = damage(path)
        if problem is not None:
            raise CheckpointError(f"{problem}: not a whole checkpoint; name another, or --resume auto")
        return path
    path, damaged = checkpoints.newest_whole()
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


def check_fits(path: Path, config: Config, digests: dict[str, str]) -> None:
    """CheckpointError where going on would not be the same run. digests: of the `training` and `validation` data."""
    state = read_state(path)
    for name, was in (("training", state.index_digest), ("validation", state.val_digest)):
        if was != digests[name]:
            raise CheckpointError(f"{path}: the {name} data's index changed since: start a run with --init {path}")
    differing = differences(deciding(load_config(path / "config.yaml")), deciding(config))
    if differing:
        raise CheckpointError(
            f"{path}: the configuration differs ({', '.join(differing[:4])}): undo that, or start a run with "
            f"--init {path}"
        )


def divided_anew(path: Path, config: Config, world: int) -> str | None:
    """What is divided otherwise than when the checkpoint was written, in words; None if nothing is."""
    state, before = read_state(path), load_config(path / "config.yaml")
    changed = [f"ranks {state.world} → {world}"] if state.world != world else []
    was, now = ({"engine": each.engine.model_dump(include=DIVIDING)} for each in (before, config))
    changed += differences(was, now)
    if before.train.accumulation != config.train.accumulation:
        changed.append(f"train.accumulation {before.train.accumulation} → {config.train.accumulation}")
    return ", ".join(changed) or None
