"""Causal LMs over a paged KV cache: rows and batches, the runner, and rooms for loading, attention and compilation."""
