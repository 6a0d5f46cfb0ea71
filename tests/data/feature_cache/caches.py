"""Small feature caches and their features, shared by the tests of the cache."""

import torch

from data.feature_cache.cache import FeatureCache
from data.feature_cache.codec import Stored, dequantise, quantise
from data.feature_cache.spec import CacheSpec, crop_key

LEVELS = ((3, 5, 4), (2, 3, 1), (7, 1, 1))
LIMIT = 1 << 26


def features(seed: int, crops: int = 4, levels=LEVELS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(crops, *level, generator=generator) * 3 for level in levels]


def keys_of(name: str, crops: int = 4) -> list[bytes]:
    return [crop_key(name, (top, 3, 64), False) for top in range(crops)]


def a_cache(root, dtype: str = "fp16", levels=LEVELS, limit: int = LIMIT, **facts) -> FeatureCache:
    return FeatureCache(root, CacheSpec("teacher", levels, {"boxes": 16, **facts}, dtype), limit_bytes=limit)


def fill(cache: FeatureCache, name: str, seed: int = 0, crops: int = 4) -> Stored:
    stored = quantise(features(seed, crops, cache.spec.levels), cache.spec.dtype)
    with cache.writer("test") as writer:
        writer.put(keys_of(name, crops), stored)
    return stored


def same(found: list[torch.Tensor] | None, stored: Stored, row: int) -> bool:
    levels = dequantise(stored)
    return found is not None and all(torch.equal(a, b[row]) for a, b in zip(found, levels, strict=True))
