"""The numbers of a cached feature: fp16, or int8 with one scale a channel; what is stored is what a hit returns.

A record's payload is the levels one after the other, fp16; or, int8, all channels' scales (fp32) and then the levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Levels = tuple[tuple[int, int, int], ...]
DTYPES = ("fp16", "int8")
_ALIGN = 8  # a row of payloads can then be seen as fp32 wherever it starts
_STEPS = 127


def payload_bytes(levels: Levels, dtype: str) -> int:
    """Bytes of one record's payload; levels (c, h, w)."""
    numbers = sum(math.prod(level) for level in levels)
    size = 2 * numbers if dtype == "fp16" else 4 * sum(level[0] for level in levels) + numbers
    return -(-size // _ALIGN) * _ALIGN


@dataclass(frozen=True)
class Stored:
    """Features of B crops as they will be on disk: `payload` uint8 [B, P], on the features' device.

    `storable` bool [B] is False for a crop that the form cannot hold: a number that is not finite, or beyond fp16's
    ±65504. It is never written; the caller goes on with what it computed.
    """

    payload: Tensor
    storable: Tensor
    levels: Levels
    dtype: str


def quantise(features: Sequence[Tensor], dtype: str) -> Stored:
    """The stored form of level features [B, c, h, w] (any float dtype, one device): fp16, or int8 per channel.

    int8 is symmetric: scale = max |x| / 127 over a channel of a crop, so its error is at most scale / 2.
    """
    if dtype not in DTYPES:
        raise ValueError(f"features cannot be stored as {dtype!r}: choose one of {', '.join(DTYPES)}")
    if not features or any(f.ndim != 4 or len(f) != len(features[0]) for f in features):
        shapes = [list(f.shape) for f in features]
        raise ValueError(f"features of shapes {shapes}: give one tensor [B, c, h, w] a level, with the same B")
    levels = tuple((int(c), int(h), int(w)) for _, c, h, w in (f.shape for f in features))
    with torch.no_grad():
        parts, storable = (_to_fp16 if dtype == "fp16" else _to_int8)([f.detach() for f in features])
        used = sum(part.shape[1] for part in parts)
        padding = parts[0].new_zeros(len(features[0]), payload_bytes(levels, dtype) - used)
        return Stored(torch.cat([*parts, padding], 1), storable, levels, dtype)


def _bytes_of(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)


def _to_fp16(features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    numbers = torch.cat([f.half().flatten(1) for f in features], 1)
    return [_bytes_of(numbers)], numbers.isfinite().all(1)  # beyond ±65504 .half() says infinity


def _to_int8(features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    scales, steps, storable = [], [], []
    for feature in (f.float() for f in features):
        largest = feature.abs().amax((2, 3), keepdim=True)
        storable.append((largest <= torch.finfo(torch.float16).max).flatten(1).all(1))  # False for NaN too
        scale = largest / _STEPS
        scales.append(scale.flatten(1))
        step = (feature / torch.where(scale > 0, scale, 1)).round().clamp(-_STEPS, _STEPS)
        steps.append(_bytes_of(step.to(torch.int8).flatten(1)))
    return [_bytes_of(torch.cat(scales, 1)), *steps], torch.stack(storable).all(0)


def dequantise(stored: Stored, computed: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The tensors [B, c, h, w] fp16 that a later hit will return, bit for bit, on any device.

    Rows that are not storable are meaningless; with `computed` (the features themselves) they come from there, and the
    result is float32, which holds both.
    """
    levels = decode(stored.payload, stored.levels, stored.dtype)
    if computed is None:
        return levels
    kept = stored.storable.view(-1, 1, 1, 1)
    return [
        torch.where(kept, level.float(), given.detach().float()) for level, given in zip(levels, computed, strict=True)
    ]


def decode(payload: Tensor, levels: Levels, dtype: str) -> list[Tensor]:
    """Level features [B, c, h, w] fp16 of payloads uint8 [B, P]; views of them for fp16."""
    found, at = [], 0
    if dtype == "fp16":
        for level in levels:
            size = 2 * math.prod(level)
            found.append(payload[:, at : at + size].view(torch.float16).unflatten(1, level))
            at += size
        return found
    channels = sum(level[0] for level in levels)
    scales = payload[:, : 4 * channels].view(torch.float32).split([level[0] for level in levels], 1)
    at = 4 * channels
    for level, scale in zip(levels, scales, strict=True):
        size = math.prod(level)
        steps = payload[:, at : at + size].view(torch.int8).unflatten(1, level)
        # One fp32 product and one rounding to fp16: IEEE arithmetic, the same on CPU and GPU.
        found.append((steps.float() * scale[:, :, None, None]).half())
        at += size
    return found
