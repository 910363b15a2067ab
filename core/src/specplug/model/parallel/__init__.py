"""Tensor parallelism: one target over several processes, each with a part of every layer."""
