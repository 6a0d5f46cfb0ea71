"""What both operations share: argument checks, dtype rule, implementation choice, device guard, index width."""

import contextlib
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "reference", "composed", "compiled")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Settled at import (Triton settles it there too), so that a compiled caller sees two constants.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (*KERNEL_DTYPES, torch.float64)


def check_maps(tensors: dict[str, Tensor]) -> None:
    """Feature maps [B, channels, H, W]: float tensors of 4 dimensions, none of size 0, one device, one batch size."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, channels, H, W], got shape {list(tensor.shape)}")
        if min(tensor.shape) < 1:
            raise ValueError(f"{name}: shape {list(tensor.shape)} holds no element; drop empty inputs first")
        check_dtype(name, tensor)
        check_device(name, tensor, first_name, first)
        if tensor.shape[0] != first.shape[0]:
            raise ValueError(f"{name}: batch {tensor.shape[0]} differs from {first_name}'s batch {first.shape[0]}")


def check_parameters(parameters: dict[str, tuple[Tensor, tuple[int, ...]]], like: str, device_of: Tensor) -> None:
    """Parameters: float tensors of the given shapes on the device of the map called `like`."""
    for name, (tensor, shape) in parameters.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        check_dtype(name, tensor)
        check_device(name, tensor, like, device_of)


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {tensor.dtype} is not supported; use float32, float16, bfloat16 or float64")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: lies on {tensor.device} but {other_name} on {other.device}; move all inputs to one device"
        )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def choose(impl: str, tensor: Tensor, limits: Sequence[str] = (), chosen: str | None = None) -> str:
    """The implementation that runs: one of IMPLEMENTATIONS but "auto".

    limits: reasons why the kernels cannot take this call. chosen: what `kernels.routes` has for it, which "auto" takes;
    without, "auto" takes the kernels on a GPU where they can run, the composed form where they cannot, and the chunked
    reference on a CPU. A named "triton" never falls back: it raises ValueError with the first reason.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: {impl!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto" and chosen is not None:
        impl = "triton" if chosen == "triton-tiled" else chosen
    elif impl == "auto":
        if tensor.device.type != "cuda":
            return "reference"
        return "composed" if _reasons(tensor, limits) else "triton"
    if impl == "triton" and (reasons := _reasons(tensor, limits)):
        raise ValueError(f"impl: 'triton' cannot run this call: {reasons[0]}")
    return impl


def _reasons(tensor: Tensor, limits: Sequence[str]) -> list[str]:
    """Why the kernels cannot run, the most general first."""
    if not TRITON_INSTALLED:
        return ["the triton package is not installed", *limits]
    if not INTERPRETING:
        if tensor.device.type != "cuda":
            return [f"tensors lie on {tensor.device}, the kernels need a CUDA or ROCm GPU", *limits]
        if tensor.dtype not in KERNEL_DTYPES:
            return [f"dtype {tensor.dtype} has no kernel; use float32, float16 or bfloat16", *limits]
    return list(limits)


def as_plane(tensor: Tensor) -> Tensor:
    """The map itself where its H and W are one dimension of one stride (NCHW, channels_last, slices of batch or
    channels of either); else a contiguous copy of it, channels_last if its channels lie together."""
    H, W = tensor.shape[2:]
    rows = tensor.stride(2) == W * tensor.stride(3) or H == 1 or W == 1
    if rows and (tensor.stride(3) == 1 or W == 1 or tensor.stride(1) == 1):
        return tensor
    return tensor.contiguous(memory_format=memory_format(tensor))


def plane_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A plane (see as_plane) laid out as `like`, so that a launch sees one layout: the one that was checked."""
    wanted = memory_format(like)
    return as_plane(tensor if memory_format(tensor) == wanted else tensor.contiguous(memory_format=wanted))


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last where neighbouring channels are neighbours in memory, else contiguous."""
    last = tensor.shape[1] > 1 and tensor.stride(1) == 1 and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def new_map(like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Uninitialised dense map in the dtype and layout (NCHW or channels_last) of `like`; of its shape by default."""
    shape = like.shape if shape is None else shape
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def pixel_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of batch, channel and flattened pixel of a plane (see as_plane)."""
    pixel = tensor.stride(3) if tensor.shape[3] > 1 else tensor.stride(2)
    return tensor.stride(0), tensor.stride(1), pixel


def needs_int64(*maps: Tensor) -> bool:
    """Whether an element's offset inside one sample of a map [B, C, N] passes 2^31 − 1.

    Offsets of padded lanes may wrap: they are masked, never read. A sample's own offset is 64-bit always.
    """
    return any((m.shape[1] - 1) * m.stride(1) + (m.shape[2] - 1) * m.stride(2) > 2**31 - 1 for m in maps)


def splits_over_pixels(pixels: int, batch: int, block: int) -> tuple[int, int]:
    """(splits, blocks in each) of a reduction over pixels: at least 4 blocks a program, at most about 1024 programs.

    A function of the shape alone, so a result repeats bitwise whatever the device is doing.
    """
    blocks = -(-pixels // block)
    steps = max(4, -(-blocks * batch // 1024))
    steps = min(steps, blocks)
    return -(-blocks // steps), steps


def device_guard(tensor: Tensor):
    """Makes the tensor's GPU current for a launch; nothing on a CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def target_architecture() -> int | str:
    """Compute capability × 10 (80, 90, 100) or gfx name of the current GPU, or of the compiler lane's target."""
    from triton.runtime import driver

    return driver.active.get_current_target().arch
