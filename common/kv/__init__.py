"""A worker's KV cache: blocks, who holds them, and how they are found again."""
