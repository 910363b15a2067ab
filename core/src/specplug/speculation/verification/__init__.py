"""Lossless verification: every emitted token is distributed as the target's own."""
