"""Kernels of our own for CPUs, compiled once on the user's machine where it has a C++ compiler.

PyTorch's own kernels do the same work elsewhere. What is gained: a product of a few rows with a packed bfloat16 weight runs at
the speed at which the weight can be read, and attention reads a paged KV cache in place, for all rows and trees in one call.
"""

from specplug.native.library import (
    available,
    go_without,
    has_matrix_units,
    key,
    load,
    must_be_compiled,
    packs_bfloat16,
)

__all__ = ["available", "go_without", "has_matrix_units", "key", "load", "must_be_compiled", "packs_bfloat16"]
