"""Find and load what training saved: a run, one of its checkpoints, or an exported model."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from model.deblurrer import Deblurrer
from model.pretrained import (
    CONFIG,
    SHIPPED,
    SHIPPED_NAME,
    SINGLE,
    WEIGHTS,
    load_config,
    load_pretrained,
    tensor_names,
)
from train.checkpoint.folder import Checkpoints
from train.checkpoint.manifest import MANIFEST, damage, read_tensors
from train.config.file import build_config
from train.config.networks import build_model
from train.config.schema import Config

RUNS = Path("runs")  # where runs are kept, and a bare name of one is looked for


def model_folder(path: str | Path, which: str = "latest") -> Path:
    """The folder with model.safetensors: of a run (its `latest` or `best` checkpoint, or `step-N`), or `path` itself;
    a .safetensors file stands for itself, and `shipped` for the one that comes with the program, unless a
    model here or a run has that name.

    ValueError if there is none, or the chosen checkpoint is damaged.
    """
    path = Path(path).expanduser()
    if is_shipped(path):
        path = SHIPPED
    if (path / WEIGHTS).is_file():
        problem = damage(path) if (path / MANIFEST).is_file() else None
        if problem is not None:
            raise ValueError(f"{problem}: the checkpoint is damaged; choose another")
        return path
    if path.is_file() and path.suffix == SINGLE:
        return path
    checkpoints = Checkpoints(path / "checkpoints", keep=1)
    steps = checkpoints.steps()
    if not path.exists():
        raise ValueError(f"{path}: no such run: give the folder of a run, a checkpoint or an exported model")
    if path.is_file():
        raise ValueError(f"{path}: is no model: give a folder, or a {SINGLE} file that `sharpprior export` wrote")
    if not steps:
        raise ValueError(f"{path}: no model in it: give the folder of a run with a checkpoint, or an exported model")
    if which == "latest":
        chosen = checkpoints.path(steps[-1])
    elif which == "best":
        chosen = checkpoints.best() or checkpoints.path(steps[-1])
    else:
        digits = which.removeprefix("step-")
        if not digits.isdigit() or int(digits) not in steps:
            raise ValueError(f"{path}: no checkpoint {which}: there are {', '.join(f'step-{step}' for step in steps)}")
        chosen = checkpoints.path(int(digits))
    problem = damage(chosen)
    if problem is not None:
        raise ValueError(f"{problem}: the checkpoint is damaged; choose another with --checkpoint step-N")
    return chosen


def is_shipped(name: str | Path) -> bool:
    """Whether a name is the shipped model's."""
    places = (Path(name), RUNS / name)
    taken = any((place / WEIGHTS).is_file() or (place / "checkpoints").is_dir() for place in places)
    return str(name) == SHIPPED_NAME and not taken


def load_model(path: str | Path, device: torch.device, which: str = "latest") -> tuple[Deblurrer, Config, Path]:
    """(network in eval mode, configuration, folder or file) of what was saved. ValueError if it does not load."""
    folder = model_folder(path, which)
    if all(name.startswith("prior.") for name in tensor_names(folder)):
        raise ValueError(f"{folder}: holds a prior alone: plug it into a network with train/main.py --prior")
    config = build_config(load_config(folder), {(): str(folder / CONFIG if folder.is_dir() else folder)})
    try:
        network = build_model(config, read_weights=False)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(
            f"{folder}: its configuration describes a network that cannot be built here ({str(error).splitlines()[0]})"
        ) from None
    load_pretrained(network, folder)
    return network.to(device).eval(), config, folder


def refuse_oracle(oracle: bool, source: Path, more: str = "") -> None:
    """ValueError for `model.oracle`, with what was asked of it or what to do: who restores lacks the sharp picture."""
    if oracle:
        raise ValueError(
            f"{source}: an oracle, which reads a teacher's features of the sharp picture (model.oracle): a bound for "
            f"studies, which restores nothing{more and f'; {more}'}"
        )


def loss_state(folder: Path) -> dict | None:
    """The measured feature statistics beside a checkpoint's model; None for an exported model."""
    path = folder / "loss.pt"
    return read_tensors(path) if path.is_file() else None


def describe(folder: Path) -> str:
    """`step N` of a checkpoint, else the folder's name."""
    try:
        return f"step {json.loads((folder / 'run.json').read_text())['step']}"
    except (OSError, ValueError, KeyError):
        return folder.name
