"""Data sets as released, photographs and video become shard sets; resumable, the same bytes every time."""
