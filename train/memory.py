"""Memory of a training rank, from shapes alone: states by ZeRO stage, and the activations that autograd would keep."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from train.config import Config

# Copies of the trained parameters in fp32 elements, as DeepSpeed holds them: (parameters, gradients, optimizer states,
# averages); `True` where the stage divides them among the ranks. ZeRO keeps a fp32 master copy beside the parameters.
_DIVIDED = {
    0: (False, False, False, False),
    1: (False, False, True, False),
    2: (False, True, True, False),
    3: (True, True, True, True),
}


def memory_per_rank(config: Config, network: nn.Module, world: int, micro: int) -> dict[str, float]:
    """Bytes by purpose for a network (on any device, meta too), and their sum. The allocator's slack, kernels' scratch
    space and communication buffers come on top."""
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    parameters, gradients, states, averages = (world if divided else 1 for divided in _DIVIDED[config.engine.zero])
    master = 1 if config.engine.zero else 0
    host = config.engine.offload == "cpu"
    sizes = {
        "parameters": 4 * count / parameters,
        "gradients": 4 * count / gradients,
        "AdamW's moments" + (", fp32 master" if master else "") + (" (in host memory)" if host else ""): (
            8 + 4 * master
        )
        * count
        / states,
        "averaged weights": 4 * count / averages,
        "activations": activation_bytes(config, network, micro),
    }
    on_device = sum(size for name, size in sizes.items() if "host memory" not in name)
    return {**sizes, "sum on the device": on_device}


def activation_bytes(config: Config, network: nn.Module, micro: int) -> int:
    """Bytes that autograd keeps for the backward pass of a micro-batch: every distinct storage saved in a forward pass
    on fake tensors, parameters not counted."""
    saved: dict[int, tuple[int, torch.UntypedStorage]] = {}
    bf16 = config.engine.precision == "bf16"
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        twin = _fake_copy(network, fake)
        own = {tensor.untyped_storage()._cdata for tensor in (*twin.parameters(), *twin.buffers())}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = (storage.nbytes(), storage)  # kept alive, so that no address comes twice
            return tensor

        image = torch.empty(micro, 3, config.data.crop, config.data.crop)
        autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
            out = twin(image)
        del out
    return sum(size for size, _ in saved.values())


def _fake_copy(network: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """The structure with fake CPU tensors for weights: no memory, no reading."""
    memo: dict[int, torch.Tensor] = {}
    with fake:
        for tensor in (*network.parameters(), *network.buffers()):
            twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
        return copy.deepcopy(network, memo)
