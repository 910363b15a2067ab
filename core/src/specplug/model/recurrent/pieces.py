"""The functions of Transformers' modelling code that carry state from token to token, and what replaces them.

A layer of a hybrid model calls them by name, as globals of its module. They are the same in every model kind, since
Transformers swaps them for optimised kernels; specplug swaps them for versions over packed rows with a state each.
"""

from __future__ import annotations

from specplug.model.recurrent.convolution import ShortConvolution
from specplug.model.recurrent.delta_rule import DeltaRule
from specplug.model.recurrent.memory import StateMemory
from specplug.model.recurrent.selective_scan import SelectiveScan
from specplug.model.recurrent.state_space import StateSpaceScan

PIECES: dict[str, type[StateMemory]] = {
    "causal_conv1d_fn": ShortConvolution,
    "torch_chunk_gated_delta_rule": DeltaRule,
    "chunk_kimi_delta_attention": DeltaRule,
    "mamba2_chunk_scan": StateSpaceScan,
    "mamba_selective_scan": SelectiveScan,
}
"""Function name → the memory that also computes it."""
