"""The kernel calls of a run, from shapes alone: what `kernels.check` has to judge for it."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.routes import Case, record
from train.config.networks import build_model
from train.config.patches import evaluated_at_once, in_phase, phases
from train.config.schema import Config
from train.engine.network import shape_network
from train.engine.precision import COMPUTE, SIXTEEN_BIT_PARAMETERS, planned, use_sixteen_bit_parameters


def kernel_cases(config: Config, world: int, device: str) -> list[Case]:
    """Cases of a training micro-batch of one of `world` ranks in each phase, and of an evaluation's crops, in the run's
    precision (auto counts as bf16) and layout; none without a prior. device: cpu or cuda, whose layouts and autocast
    differ.

    ValueError where `world` does not divide the batch, or the device is another or needs a GPU for its autocast.
    """
    config = planned(config)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r}: kernel calls are listed for cpu or cuda")
    if device == "cuda" and config.engine.precision in COMPUTE and not torch.cuda.is_available():
        raise ValueError(f"device cuda: what {config.engine.precision} computes there can only be listed on a GPU")
    # Batches from the loader's processes have a pixel's channels side by side, other pictures lie plane by plane.
    loaded = torch.contiguous_format if config.blur.device == "cuda" else torch.channels_last
    sizes = [in_phase(config, phase) for phase in phases(config)]
    calls = [(each.micro_batch(world), each.data.crop, loaded) for each in sizes]
    if config.eval.enabled:
        calls.append((evaluated_at_once(config, world, device), config.eval.crop, torch.contiguous_format))
    if not config.model.prior:
        return []
    with torch.device("meta"):
        network = build_model(config, read_weights=False)
    # Recomputed blocks make the same calls again; a compiled network makes those of an eager one.
    engine = config.engine.model_copy(update={"checkpointing": False, "compile": False})
    dtype, place = COMPUTE.get(engine.precision), torch.device(device)
    autocast = torch.autocast(device, dtype) if dtype else contextlib.nullcontext()
    with FakeTensorMode(), torch.no_grad(), record() as found:
        twin = _twin(network, place, dtype if engine.precision in SIXTEEN_BIT_PARAMETERS else None)
        use_sixteen_bit_parameters(twin, engine, place)
        shape_network(twin, engine, place)
        with autocast:
            for batch, crop, layout in calls:
                twin(torch.empty(batch, 3, crop, crop, device=place, memory_format=layout))
    return list(found)


def _twin(network: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """The network with fake tensors of a device for weights, parameters in `dtype` (None: their own)."""
    memo = {}
    for tensor in (*network.parameters(), *network.buffers()):
        parameter = isinstance(tensor, nn.Parameter)
        fake = torch.empty(tensor.shape, dtype=(dtype if parameter else None) or tensor.dtype, device=device)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if parameter else fake
    return copy.deepcopy(network, memo)
