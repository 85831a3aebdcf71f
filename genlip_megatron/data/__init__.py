"""Data: shards and their index become PackedBatch, the same on any number of ranks."""
