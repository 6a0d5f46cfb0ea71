"""The averaged model of a checkpoint, written tensor by tensor."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from model.pretrained import CONFIG_KEY, WEIGHTS, SafetensorsWriter, config_text, write_config
from train.checkpoint.manifest import CheckpointError
from train.config.schema import Config
from train.engine.average import Ema
from train.engine.engine import Engine
from train.engine.zero import whole_shape, zero3_gathered


def write_model(folder: Path, engine: Engine, ema: Ema, config: Config) -> None:
    """Write the averaged model, one tensor after the other; every rank calls this. CheckpointError where a weight is
    not finite: nothing of it stays."""
    tensors = _model_tensors(engine.module, ema)
    text = config_text(config.model_dump(mode="json"))
    layout = [(name, shape, dtype) for name, shape, dtype, _ in tensors]
    file = SafetensorsWriter(folder / WEIGHTS, layout, {CONFIG_KEY: text})
    opened, failure = contextlib.ExitStack(), None

    def attempt(work: Callable[[], object]) -> None:
        """On rank 0; a failure waits for the end, because the other ranks are in the collectives below."""
        nonlocal failure
        if engine.main and failure is None:
            try:
                work()
            except Exception as error:
                failure = error

    attempt(lambda: opened.enter_context(file))
    for name, *_, whole in tensors:
        value = whole()
        attempt(partial(_write_finite, file, name, value, folder))
    with engine.agreed():
        if failure is not None:
            opened.__exit__(type(failure), failure, None)
            raise failure
        opened.close()
        if engine.main:
            write_config(folder, text)


def _write_finite(file: SafetensorsWriter, name: str, value: torch.Tensor, folder: Path) -> None:
    if value.is_floating_point() and not torch.isfinite(value).all():
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            f"{folder.with_suffix('')}: not written, the weights are not finite ({name}): start again from an older "
            "checkpoint: --init it, with a lower optim.lr and another run.name"
        )
    file.write(value)


def _model_tensors(
    module: nn.Module, ema: Ema
) -> list[tuple[str, tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]]:
    """(name, shape, dtype, how to get it whole) of the averaged model's tensors, in the same order on every rank."""
    found = []
    # A parameter may be used under many names: the average knows it by its first, the file has them all.
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    for prefix, part in module.named_modules(remove_duplicate=False):
        own: dict[str, torch.Tensor] = {}
        part._save_to_state_dict(own, f"{prefix}." if prefix else "", keep_vars=True)
        for name, tensor in own.items():
            shape = tuple(whole_shape(tensor))
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            averaged = first.get(id(tensor), name)
            whole = partial(ema.whole, averaged) if averaged in ema.averages else partial(_whole, tensor)
            found.append((name, shape, dtype, whole))
    return sorted(found, key=lambda entry: (-entry[2].itemsize, entry[0]))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A frozen parameter or a buffer; collective under ZeRO-3."""
    with zero3_gathered([tensor]):
        return tensor.detach().clone()
