"""A trained model as two files that need nothing but this package: `model.safetensors` and `config.yaml`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"


def save_pretrained(folder: str | Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write a full state dict and its resolved config; each file appears whole or not at all.

    The tensors keep their dtype (fp32 or bf16) and are copied to the CPU. The config is written last: a folder with a
    config has its weights. Raises ValueError when the folder cannot be written.
    """
    folder = Path(folder)
    tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        _replace(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot write the model to {folder}: {error.strerror or error}") from error


def load_config(folder: str | Path) -> dict[str, Any]:
    """Return the config a model was saved with; ValueError if it is absent or no YAML mapping."""
    path = Path(folder) / CONFIG
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no model in {folder}: {CONFIG} is absent (name a folder written by training)") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: a mapping of settings is expected")
    return config


def load_state(folder: str | Path) -> dict[str, torch.Tensor]:
    """Return the saved state dict, on the CPU; ValueError if the file is absent or damaged."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"no model in {folder}: {WEIGHTS} is absent (name a folder written by training)")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): save the model again") from error


def load_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Load a saved state dict into `model`, strictly; ValueError names the keys and shapes that do not fit."""
    load_strictly(model, load_state(folder), str(Path(folder) / WEIGHTS))


def load_strictly(model: nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Load `state` (read from `where`) into `model`, casting to the model's dtypes.

    Nothing is loaded unless every key and shape fits; the ValueError names the first of what is missing, unexpected, or
    of another shape, and how many there are.
    """
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    shapes = [
        f"{key} ({list(state[key].shape)}, not {list(value.shape)})"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{what} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise ValueError(
            f"{where} does not fit this model: {'; '.join(problems)}: build it from the config saved with it"
        )
    model.load_state_dict(dict(state), strict=True)


def _replace(path: Path, write) -> None:
    """Write through a temporary name beside `path`, force it to disk, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
