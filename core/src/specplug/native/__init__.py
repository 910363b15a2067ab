"""Our own CPU kernels, compiled once on the user's machine where it has a C++ compiler.

PyTorch's kernels do the same work elsewhere. The gain: a linear layer of a few rows with a packed bfloat16 weight runs at
memory bandwidth, and attention reads a paged KV cache in place, for all rows and trees in one call.
"""

from specplug.native.library import (
    available,
    go_without,
    has_amx,
    key,
    load,
    must_be_compiled,
    packs_bfloat16,
)

__all__ = ["available", "go_without", "has_amx", "key", "load", "must_be_compiled", "packs_bfloat16"]
