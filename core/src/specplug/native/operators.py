"""The operators' schemas, and what they return for shapes alone, so that compiled forwards can contain them.

`attend` writes new keys and values into the cache it is given without declaring it: a layer's cache is touched by that layer's
`attend` only, whose result is always used, and a declared mutation would make a compiled forward copy or re-link every cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_SCHEMAS = (
    "attend(Tensor query, Tensor key, Tensor value, Tensor keys, Tensor values, Tensor plan, Tensor slots, "
    "float scaling, int window, float softcap, Tensor? sinks) -> Tensor",
    "pack_weight(Tensor weight) -> Tensor",
    "linear(Tensor states, Tensor packed, Tensor? bias, int out_features) -> Tensor",
    "linears(Tensor states, Tensor[] packed, Tensor?[] biases, int[] out_features) -> Tensor[]",
)
_library = torch.library.Library("specplug", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)


@torch.library.register_fake("specplug::attend", lib=_library)
def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


@torch.library.register_fake("specplug::linear", lib=_library)
def _linear(states: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int) -> torch.Tensor:
    return states.new_empty(*states.shape[:-1], out_features)


@torch.library.register_fake("specplug::linears", lib=_library)
def _linears(
    states: torch.Tensor, packed: Sequence[torch.Tensor], biases: Sequence[object], out_features: Sequence[int]
) -> list[torch.Tensor]:
    return [states.new_empty(*states.shape[:-1], count) for count in out_features]


attend = torch.ops.specplug.attend.default
pack_weight = torch.ops.specplug.pack_weight.default
linear = torch.ops.specplug.linear.default
linears = torch.ops.specplug.linears.default
