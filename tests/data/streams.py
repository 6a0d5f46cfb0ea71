"""Streams for tests."""

from pathlib import Path

from data.blur import BlurConfig
from data.shards.set import ShardSet
from data.stream.config import StreamConfig
from data.stream.loader import PairLoader


def loader(sets, blur: BlurConfig | None = None, **options) -> PairLoader:
    """A stream of one set or several, opened or by their folders; options of StreamConfig and PairLoader, in one."""
    options = {"crop": 32, "margin": 8, "workers": 0, "global_batch": 4, "seed": 3, "batches": 4} | options
    stream = StreamConfig(**{name: options.pop(name) for name in options.keys() & StreamConfig.model_fields.keys()})
    sets = [sets] if isinstance(sets, Path | ShardSet) else sets
    opened = [s if isinstance(s, ShardSet) else ShardSet(s, check=stream.max_bad_fraction == 0) for s in sets]
    return PairLoader(opened, blur or BlurConfig(), stream, **options)
