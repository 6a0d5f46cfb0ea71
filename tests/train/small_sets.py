"""Small shard sets for runs in tests, cut from the bundled photographs."""

from pathlib import Path

from data.shards.set import ShardSet
from data.shards.write import ShardWriter

BUNDLED = Path(__file__).parents[2] / "data" / "samples"


def small_set(folder: Path, split: str, count: int) -> Path:
    """A set of `count` bundled photographs, spread over the split, in two shards."""
    source = ShardSet(BUNDLED / split)
    with ShardWriter(folder, shard_bytes=1 + sum(len(source.read(n, "jpg")) for n in range(count // 2))) as writer:
        for number in range(count):
            sample = number * len(source) // count
            writer.add(f"photo_{number}", {"jpg": source.read(sample, "jpg")})
    return folder
