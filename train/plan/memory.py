"""Memory of a training rank, from shapes alone: states by ZeRO stage, and the activations that autograd would keep."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.summary import fake_copy
from train.config.schema import Config, EngineSection
from train.engine.network import recompute_blocks
from train.engine.precision import COMPUTE, SIXTEEN_BIT_PARAMETERS, use_sixteen_bit_parameters
from train.engine.settings import bucket_elements


def _bucket_bytes(engine: EngineSection, trained: int) -> int:
    """Of all buckets: one for each type in which gradients travel, ZeRO 1 and 2 hold it in the parameters' type."""
    if engine.zero == 0:
        return 0
    if engine.precision == "bf16":
        widths = (4, 4) if engine.zero < 3 else (2, 4)
    else:
        widths = (2,) if engine.precision in SIXTEEN_BIT_PARAMETERS else (4,)
    doubled = 2 if engine.overlap_comm and engine.zero < 3 else 1
    return bucket_elements(engine, trained) * sum(widths) * doubled


def memory_per_rank(config: Config, network: nn.Module, world: int, micro: int) -> dict[str, float]:
    """Bytes by purpose for a network (on any device, meta too), and their sum on the device. What lies in host memory
    says so. The allocator's slack, kernels' scratch space, the collectives' own buffers and the parameters that ZeRO 3
    gathers for a while come on top."""
    engine = config.engine
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    sixteen = engine.precision in SIXTEEN_BIT_PARAMETERS
    parameter = 2 if sixteen else 4
    # ZeRO 2 and 3 add up gradients in fp32, in the rank's own part; before that in the parameters' type.
    gradient = 4 if engine.zero >= 2 else parameter
    state = 12 if engine.zero else 8  # Adam's two moments, and ZeRO's fp32 master copy
    host, host_parameters = engine.offload == "cpu", engine.offload_parameters == "cpu"

    def part(size: int, divided: bool) -> float:
        return size * count / (world if divided else 1)

    entries = (
        ("parameters", part(parameter, engine.zero == 3), host_parameters),
        ("gradients", part(gradient, engine.zero >= 2), host and engine.zero >= 2),
        *([("gradients' buckets", float(_bucket_bytes(engine, count)), False)] if engine.zero else []),
        ("AdamW's moments" + (", fp32 master" if engine.zero else ""), part(state, engine.zero >= 1), host),
        # They are averages of what the optimizer steps, and lie where that does.
        ("averaged weights", part(4, engine.zero >= 1), host),
        ("activations", float(activation_bytes(config, network, micro)), False),
    )
    sizes = {name + (" (in host memory)" if away else ""): size for name, size, away in entries}
    return {**sizes, "sum on the device": sum(size for _, size, away in entries if not away)}


def activation_bytes(config: Config, network: nn.Module, micro: int) -> int:
    """Bytes that autograd keeps for the backward pass of a micro-batch: every distinct storage saved in a forward pass
    on fake tensors, parameters not counted. With `engine.checkpointing` that is the blocks' inputs and all outside of
    blocks; while a block's backward pass runs, its inside comes on top."""
    saved: dict[int, tuple[int, torch.UntypedStorage]] = {}
    lower = COMPUTE.get(config.engine.precision)
    sixteen = config.engine.precision in SIXTEEN_BIT_PARAMETERS
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = fake_copy(network, lower if sixteen else None)
        use_sixteen_bit_parameters(twin, config.engine, torch.device("cpu"))
        if config.engine.checkpointing:
            recompute_blocks(twin)
        own = {tensor.untyped_storage()._cdata for tensor in (*twin.parameters(), *twin.buffers())}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = (storage.nbytes(), storage)  # kept alive, so that no address comes twice
            return tensor

        image = torch.empty(micro, 3, config.data.crop, config.data.crop)
        autocast = torch.autocast("cpu", lower) if lower else contextlib.nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
            out = twin(image)
        del out
    return sum(size for size, _ in saved.values())
