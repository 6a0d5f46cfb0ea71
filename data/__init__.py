"""Photographs to batches of blurry and sharp crops: shards, streams, blur, caches, preparation. Knows no model."""
