"""Fences round buffers: what an operation writes outside its results, or reads outside its inputs, shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# A multiple of every alignment that loads are specialised for.
MARGIN_BYTES = 4096
PATTERN = 0xA5


class Fences:
    """The buffers that were made inside `fenced()`."""

    def __init__(self) -> None:
        self._stores: list[Tensor] = []

    def add(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, memory_format: torch.memory_format):
        """An uninitialised tensor between two fences; floating ones hold NaN until somebody writes them."""
        size = shape.numel() * dtype.itemsize
        store = torch.full((size + 2 * MARGIN_BYTES,), PATTERN, dtype=torch.uint8, device=device)
        self._stores.append(store)
        inner = store[MARGIN_BYTES : MARGIN_BYTES + size].view(dtype)
        if dtype.is_floating_point:
            inner.fill_(float("nan"))
        if memory_format == torch.channels_last:
            B, C, H, W = shape
            return inner.view(B, H, W, C).permute(0, 3, 1, 2)
        return inner.view(shape)

    def broken(self) -> bool:
        """Whether one of the fences was written over; waits for the device."""
        m = MARGIN_BYTES
        return any(bool((s[:m] != PATTERN).any() | (s[-m:] != PATTERN).any()) for s in self._stores)

    def __len__(self) -> int:
        return len(self._stores)


@contextlib.contextmanager
def fenced() -> Iterator[Fences]:
    """Every `torch.empty` and `torch.empty_like` of the block, in every thread, gives a buffer between fences."""
    fences, plain = Fences(), torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        known = {"dtype", "device", "memory_format"}
        if options.keys() - known or any(not isinstance(n, int) for n in shape):
            return plain(*size, **options)
        dtype, device = options.get("dtype") or torch.get_default_dtype(), torch.device(options.get("device") or "cpu")
        return fences.add(torch.Size(shape), dtype, device, options.get("memory_format", torch.contiguous_format))

    def empty_like(like: Tensor, **options: Any) -> Tensor:
        given = options.pop("memory_format", torch.preserve_format)
        if given == torch.preserve_format:
            last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
            given = torch.channels_last if last and not like.is_contiguous() else torch.contiguous_format
        return empty(
            tuple(like.shape), **{"dtype": like.dtype, "device": like.device, "memory_format": given} | options
        )

    with mock.patch.object(torch, "empty", empty), mock.patch.object(torch, "empty_like", empty_like):
        yield fences


def between_nans(tensor: Tensor) -> Tensor:
    """The same values and strides, with NaN before and after them in memory."""
    margin, span = MARGIN_BYTES // tensor.element_size(), tensor.untyped_storage().nbytes() // tensor.element_size()
    store = torch.full((span + 2 * margin,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    copy = store.as_strided(tensor.shape, tensor.stride(), margin)
    return copy.copy_(tensor)
