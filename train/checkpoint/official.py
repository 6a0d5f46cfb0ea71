"""Official checkpoints of deblurring networks, read without running what is in them, become models of this project."""

from __future__ import annotations

import argparse
import collections
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from model.backbones import BACKBONES, PRESETS
from model.deblurrer import build_backbone
from model.pretrained import SINGLE, load_strictly, save_pretrained
from train.checkpoint.export import check_target
from train.config.file import build_config

# Under which keys releases keep the weights, the best first: BasicSR (NAFNet, Restormer, FFTformer) has params_ema and
# params, MPRNet and Uformer state_dict, MIMO-UNet model.
WRAPPERS = ("params_ema", "params", "state_dict", "model_state", "model_state_dict", "model", "net", "generator")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


def import_official(file: Path, backbone: str, settings: Mapping[str, Any], out: Path, *, overwrite: bool) -> nn.Module:
    """Write an official checkpoint as a model without a prior to `out` (a folder, or a file NAME.safetensors), and
    return the network, on the meta device.

    backbone: a preset or a backbone; settings: of that backbone, over the preset's. Nothing in the file is executed.
    ValueError for a file that is damaged, holds code, is of another network (naming the preset that it fits, where one
    does), or a place that is taken.
    """
    if "name" in settings:
        raise ValueError("--set name=…: the backbone's name is what --backbone gives")
    with torch.device("meta"):
        network = build_backbone(backbone, **settings)
    state = read_official(file)
    _check_fits(network, state, file, backbone)
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(f"{file}: {bad[0]} has values that are not finite (and {len(bad) - 1} more): not imported")
    config = build_config({"model": {"backbone": {"name": backbone, **settings}, "prior": False}})
    check_target(out, file, overwrite=overwrite)
    save_pretrained(out, {f"backbone.{name}": value for name, value in state.items()}, config.model_dump(mode="json"))
    return network


def read_official(file: Path) -> dict[str, torch.Tensor]:
    """The state dict in a .pth or .safetensors file, out of the wrappers that releases use; ValueError, one line."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        if file.suffix == SINGLE:
            found: Any = load_file(file)
        else:
            with torch.serialization.safe_globals(harmless()):
                found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        kind = re.search(r"[Uu]nsupported (?:global|class|operand)[^\w]*(?:GLOBAL )?([\w.]+)", str(error))
        raise ValueError(
            f"{file}: is no plain checkpoint: it is damaged, or holds objects beside tensors, which are not loaded "
            f"because they may run code ({kind[1] if kind else 'pickled objects'}): save its state dict alone "
            "where you trust it"
        ) from error
    except Exception as error:  # damaged files raise from an open-ended family
        raise ValueError(f"{file}: is damaged or no checkpoint ({_line(error)})") from error
    for _ in range(4):  # wrappers in wrappers, however deep a file has them
        inner = [key for key in WRAPPERS if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)]
        if not inner:
            break
        found = found[inner[0]]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, torch.Tensor) for v in found.values()):
        held = ", ".join(map(str, list(found)[:6])) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{file}: holds no state dict of tensors (it holds {held or 'nothing'})")
    state = dict(found)
    for prefix in PREFIXES * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def harmless() -> list[Any]:
    """Types beside tensors that releases keep next to the weights (their options, their best score), and that hold
    data alone."""
    arrays = np._core.multiarray
    numpy_names = [
        (getattr(arrays, name), f"numpy.{core}.multiarray.{name}")  # NumPy's releases differ in where these are
        for name in ("_reconstruct", "scalar")
        for core in ("core", "_core")
    ]
    dtypes = [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "b1", "S1", "U1")]
    plain = [int, float, str, list, dict, set, collections.OrderedDict, argparse.Namespace]
    return [*plain, np.dtype, np.ndarray, *numpy_names, *dtypes]


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def fitting_presets(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the presets and backbones whose keys and shapes are those of a state dict."""
    shapes = {name: value.shape for name, value in state.items()}
    found = []
    for name in [*PRESETS, *BACKBONES]:
        with torch.device("meta"):
            own = {key: value.shape for key, value in build_backbone(name).state_dict().items()}
        if own == shapes:
            found.append(name)
    return found


def _check_fits(network: nn.Module, state: dict[str, torch.Tensor], file: Path, backbone: str) -> None:
    own = {name: value.shape for name, value in network.state_dict().items()}
    if own == {name: value.shape for name, value in state.items()}:
        return
    fitting = fitting_presets(state)
    advice = f": it is a checkpoint of {fitting[0]}: give --backbone {fitting[0]}" if fitting else ""
    load_strictly(network, state, f"{file} is no checkpoint of {backbone}", advice)
