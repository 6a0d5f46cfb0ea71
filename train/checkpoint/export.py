"""A run's averaged model as files of its own, which load without DeepSpeed and without the run."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from model.pretrained import (
    CONFIG,
    CONFIG_TENSOR,
    SINGLE,
    WEIGHTS,
    config_tensor,
    load_config,
    load_state,
    save_pretrained,
)
from train.checkpoint.manifest import MANIFEST
from train.checkpoint.plug import part_state
from train.checkpoint.saved import model_folder, refuse_oracle
from train.config.file import build_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Keys of a configuration that name places of the machine where it ran.
PATHS = (
    ("run", "root"),
    ("data", "train"),
    ("data", "val"),
    ("data", "cache", "folder"),
    ("features", "folder"),
    ("model", "backbone_from"),
    ("model", "prior_from"),
)


def export_model(
    run: Path,
    out: Path,
    *,
    which: str,
    dtype: str,
    overwrite: bool,
    prior: bool = False,
    spandrel: bool = False,
    paths: bool = True,
) -> Path:
    """Write the model of a run, checkpoint or export to `out` and return the folder or file that it was read from.

    out: a file NAME.safetensors, which holds the configuration in its metadata, or a folder for model.safetensors and
    config.yaml. dtype: fp32 (as trained: the same outputs) or bf16 (half the size; loaded back as fp32). prior: the
    prior network alone, which `model.prior_from` takes over. spandrel: the configuration is one of the tensors too, as
    programs that load with spandrel need it (`train.restore.spandrel`). paths: False leaves out which folders of
    this machine the run read and wrote. ValueError on a wrong path, a damaged
    checkpoint, a model without a prior, or files that exist.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: expected {' or '.join(DTYPES)}")
    source = model_folder(run, which)
    target = out.expanduser()
    check_target(target, source, overwrite=overwrite)
    if prior:
        state = {f"prior.{name}": value for name, value in part_state(source, "prior").items()}
    else:
        state = load_state(source)
    state |= {name: value.to(DTYPES[dtype]) for name, value in state.items() if value.is_floating_point()}
    config = load_config(source)
    if spandrel:
        refuse_oracle(build_config(config).model.oracle, source, "--format spandrel makes no file of it")
    if isinstance(config.get("checkpoint"), dict):  # where a run's copies go is nobody else's business
        config["checkpoint"].pop("copy_to", None)
    if not paths:
        for *sections, key in PATHS:
            section = functools.reduce(lambda values, name: values.get(name) or {}, sections, config)
            section.pop(key, None)  # the default then
    if spandrel:
        state[CONFIG_TENSOR] = config_tensor(config)
    save_pretrained(target, state, config)
    return source


def check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    """ValueError where a model that comes from `source` cannot be written to `target` without harm."""
    single = target.suffix == SINGLE
    if single and target.is_dir():
        raise ValueError(f"{target}: is a folder: give a file name, or a folder without {SINGLE} in its name")
    if not single and (target.is_file() or target.suffix in (".pt", ".pth", ".bin", ".ckpt", ".onnx")):
        raise ValueError(f"{target}: give a folder, or a file whose name ends in {SINGLE}")
    if ((target.parent if single else target) / MANIFEST).is_file():
        raise ValueError(f"{target}: would damage a checkpoint: choose a place outside of the run's checkpoints")
    place = target.parent if single else target
    if (place / "checkpoints").is_dir() and (not single or target.name == WEIGHTS):
        raise ValueError(
            f"{target}: would be taken for the run's newest model from then on: choose another name or place"
        )
    if target.resolve() == source.resolve():
        raise ValueError(f"{target}: is the model itself: choose another place")
    files = [target] if single else [target / WEIGHTS, target / CONFIG]
    taken = next((file for file in files if file.exists()), None)
    if taken is not None and not overwrite:
        raise ValueError(f"{taken}: exists: choose another place, or --overwrite")
