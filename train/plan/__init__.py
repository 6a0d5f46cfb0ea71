"""What a run will cost: memory, bytes moved, step time, and the dry run."""
