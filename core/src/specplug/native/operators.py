"""The schemas and fake implementations of our operators, which compiled forwards need.

`attend` writes new keys and values into the KV cache without declaring the mutation. Only one layer's `attend` touches that
layer's cache, and its result is always used; a declared mutation would make a compiled forward copy or re-link every cache.
The operators of recurrent layers write states and entries in the same way.
"""

from __future__ import annotations

from typing import Any

import torch

_SCHEMAS = (
    "attend(Tensor query, Tensor key, Tensor value, Tensor keys, Tensor values, Tensor plan, Tensor slots, "
    "float scaling, int window, float softcap, Tensor? sinks) -> Tensor",
    "attend_rope(Tensor query, Tensor key, Tensor value, Tensor keys, Tensor values, Tensor plan, Tensor slots, "
    "float scaling, int window, float softcap, Tensor? sinks, Tensor cosines, Tensor sines) -> Tensor",
    "copy_rows(Tensor[] sources, int[] counts, int[] read, Tensor(a!)[] destinations, int[] write) -> ()",
    "argmax_with_prob(Tensor logits) -> (Tensor, Tensor)",
    "add_low_rank(Tensor output, Tensor states, Tensor down, Tensor up, Tensor ranks, Tensor segments) -> Tensor",
    "short_convolution(Tensor inputs, Tensor weight, Tensor? bias, Tensor memory, Tensor rows, bool is_activated) -> Tensor",
    "delta_rule(Tensor query, Tensor key, Tensor value, Tensor g, Tensor beta, Tensor states, Tensor keys, "
    "Tensor corrections, Tensor logs, Tensor rows, bool is_normalised) -> Tensor",
    "state_space_scan(Tensor inputs, Tensor steps, Tensor logs, Tensor writes, Tensor reads, Tensor? skips, Tensor states, "
    "Tensor kept_writes, Tensor kept_inputs, Tensor kept_logs, Tensor rows) -> Tensor",
    "pack_weight(Tensor weight, Tensor(a!) packed) -> ()",
    "linear(Tensor states, Tensor packed, Tensor? bias, int out_features) -> Tensor",
    "linears_2(Tensor states, Tensor packed_0, Tensor packed_1, Tensor? bias_0, Tensor? bias_1, "
    "int out_0, int out_1) -> (Tensor, Tensor)",
    "linears_3(Tensor states, Tensor packed_0, Tensor packed_1, Tensor packed_2, Tensor? bias_0, Tensor? bias_1, "
    "Tensor? bias_2, int out_0, int out_1, int out_2) -> (Tensor, Tensor, Tensor)",
    "gated_linears(Tensor states, Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias, int out_features, "
    "int activation) -> Tensor",
)
_library = torch.library.Library("specplug", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)


@torch.library.register_fake("specplug::attend_rope", lib=_library)
@torch.library.register_fake("specplug::attend", lib=_library)
def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


@torch.library.register_fake("specplug::add_low_rank", lib=_library)
def _add_low_rank(output: torch.Tensor, *_: object) -> torch.Tensor:
    return output.new_empty(output.shape)


@torch.library.register_fake("specplug::short_convolution", lib=_library)
def _short_convolution(inputs: torch.Tensor, *_: object) -> torch.Tensor:
    return inputs.new_empty(inputs.shape)


@torch.library.register_fake("specplug::delta_rule", lib=_library)
def _delta_rule(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return value.new_empty(value.shape)


@torch.library.register_fake("specplug::state_space_scan", lib=_library)
def _state_space_scan(inputs: torch.Tensor, *_: object) -> torch.Tensor:
    return inputs.new_empty(inputs.shape, dtype=torch.float32)


@torch.library.register_fake("specplug::linear", lib=_library)
def _linear(states: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int) -> torch.Tensor:
    return states.new_empty(*states.shape[:-1], out_features)


@torch.library.register_fake("specplug::linears_2", lib=_library)
def _linears_2(states: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    return tuple(states.new_empty(*states.shape[:-1], count) for count in arguments[-2:])


@torch.library.register_fake("specplug::linears_3", lib=_library)
def _linears_3(states: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    return tuple(states.new_empty(*states.shape[:-1], count) for count in arguments[-3:])


@torch.library.register_fake("specplug::gated_linears", lib=_library)
def _gated_linears(states: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return states.new_empty(*states.shape[:-1], arguments[-2])


@torch.library.register_fake("specplug::argmax_with_prob", lib=_library)
def _argmax_with_prob(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)


# Several linears over the same rows in one operator. Fixed arity: compiled code calls operators that take lists through Python.
JOINED = {2: torch.ops.specplug.linears_2.default, 3: torch.ops.specplug.linears_3.default}

# The activations of `gated_linears`, by PyTorch's names; see `gemm/glu.h`.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
