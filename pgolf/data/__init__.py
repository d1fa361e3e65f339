"""Text to tokens to shards to batches (recipe sections 1 and 3)."""
