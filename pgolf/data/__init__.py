"""Text to tokens to shards to batches (SYSTEM sections 1 and 3)."""
