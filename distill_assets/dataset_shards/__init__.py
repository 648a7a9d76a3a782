"""Shard files become rows of token ids with a loss mask: discovered, read, validated, encoded."""
