"""How the trained network is run: depthwise convolutions' type, recomputed blocks, channels last, torch.compile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from train.config.schema import EngineSection
from train.engine.precision import keep_depthwise_in_fp32


def shape_network(module: nn.Module, engine: EngineSection, device: torch.device) -> None:
    """Apply `checkpointing`, `channels_last`, `compile`, and on a CPU what bf16 leaves in fp32, to a module in place;
    parameters and their names stay."""
    keep_depthwise_in_fp32(module, engine, device)
    if engine.checkpointing:
        recompute_blocks(module)
    if device.type == "cuda" if engine.channels_last == "auto" else engine.channels_last:
        module.register_forward_pre_hook(_channels_last)
    if engine.compile:
        refuse_compile(device)
        # In place: a wrapper would rename every parameter. Shapes that vary (crops of the evaluation) become symbolic
        # when the second one is seen, so that there are at most two graphs of a call.
        module.compile(dynamic=None)


def blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, block): the units of the network whose inside is worth recomputing.

    A block is an element of a sequence, list or table of modules, is none of these itself, holds two or more layers
    with parameters, and lies in no other block: residual blocks of backbones and encoders, embeddings. A class may say
    otherwise of itself: `recompute = True` makes it a block wherever it stands, False has its inside searched. Frozen
    ones keep nothing for a backward pass and are left out.
    """

    def search(parent: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        container = isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        for name, child in parent.named_children():
            inner = isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
            if getattr(child, "recompute", container and not inner and _layers(child) > 1):
                if any(parameter.requires_grad for parameter in child.parameters()):
                    yield prefix + name, child
            else:
                yield from search(child, f"{prefix}{name}.")

    yield from search(module, "")


def recompute_blocks(module: nn.Module) -> int:
    """Make every block keep only its inputs for the backward pass; returns their number. ValueError if there is none.

    Every operation of the networks here repeats exactly, and none draws random numbers, so gradients are the same.
    """
    found = [block for _, block in blocks(module)]
    if not found:
        raise ValueError("engine.checkpointing: this network has no blocks to recompute: set it to false")
    for block in found:
        block.forward = partial(_recomputed, block.forward)
    return len(found)


def _recomputed(plain: Any, *inputs: Any, **keywords: Any) -> Any:
    if not torch.is_grad_enabled():
        return plain(*inputs, **keywords)
    # determinism_check: its comparison reads sizes of parameters, which are empty by then under ZeRO-3.
    return checkpoint(
        plain, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none", **keywords
    )


def _layers(module: nn.Module) -> int:
    return sum(1 for part in module.modules() if any(True for _ in part.parameters(recurse=False)))


def _channels_last(module: nn.Module, inputs: tuple) -> tuple:
    """Images as channels last: convolutions and the fused kernels pass the layout on. Weights stay as they are: ZeRO
    keeps them in flat buffers, and convolutions turn them as they need (they are small beside the feature maps)."""
    return tuple(
        value.contiguous(memory_format=torch.channels_last)
        if isinstance(value, torch.Tensor) and value.ndim == 4
        else value
        for value in inputs
    )


def refuse_compile(device: torch.device) -> None:
    """ValueError where torch.compile lacks what it needs on this machine."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # torch's own type for it moved between versions
        raise ValueError(
            "engine.compile needs a C++ compiler, and none was found (g++ or clang++, or the one that CXX names): "
            "install one, or set engine.compile to false"
        ) from error
    if device.type == "cuda" and not (shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")):
        raise ValueError(
            "engine.compile on a GPU needs a C compiler for Triton: install gcc, or set engine.compile to false"
        )
