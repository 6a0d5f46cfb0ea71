"""From shards to batches: the order, crops, pairs, loader processes, and the validation list."""
