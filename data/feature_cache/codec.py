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
        payload = features[0].new_empty(len(features[0]), payload_bytes(levels, dtype), dtype=torch.uint8)
        storable = (_fill_fp16 if dtype == "fp16" else _fill_int8)(payload, [f.detach() for f in features], levels)
        return Stored(payload, storable, levels, dtype)


def _fill_fp16(payload: Tensor, features: list[Tensor], levels: Levels) -> Tensor:
    at = 0
    for feature, level in zip(features, levels, strict=True):
        size = 2 * math.prod(level)
        payload[:, at : at + size].view(torch.float16).unflatten(1, level).copy_(feature)
        at += size
    payload[:, at:] = 0
    # Beyond ±65504 the copy says infinity: all exponent bits set, as in NaN. 18 times as fast as isfinite().all().
    return payload.view(torch.int16).bitwise_and(0x7C00).amax(1) < 0x7C00


def _fill_int8(payload: Tensor, features: list[Tensor], levels: Levels) -> Tensor:
    at = 4 * sum(level[0] for level in levels)
    scales = payload[:, :at].view(torch.float32).split([level[0] for level in levels], 1)
    storable = torch.ones(len(payload), dtype=torch.bool, device=payload.device)
    for feature, level, scale in zip(features, levels, scales, strict=True):
        numbers = feature.float()
        largest = torch.maximum(numbers.amax((2, 3)), -numbers.amin((2, 3)))
        storable &= (largest <= torch.finfo(torch.float16).max).all(1)  # False for NaN too
        scale.copy_(largest / _STEPS)
        divisor = torch.where(scale > 0, scale, 1)[:, :, None, None]
        steps = (numbers / divisor).round_().clamp_(-_STEPS, _STEPS)
        size = math.prod(level)
        payload[:, at : at + size].view(torch.int8).unflatten(1, level).copy_(steps)
        at += size
    payload[:, at:] = 0
    return storable


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
    """Level features [B, c, h, w] fp16 of payloads uint8 [B, P]: views of them for fp16, for int8 new."""
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
        numbers = payload[:, at : at + size].view(torch.int8).float().unflatten(1, level)
        # One fp32 product and one rounding to fp16: IEEE arithmetic, the same on CPU and GPU.
        numbers.mul_(scale[:, :, None, None])
        found.append(numbers.half())
        at += size
    return found
