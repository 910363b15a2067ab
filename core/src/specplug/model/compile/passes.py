"""The passes that fuse a traced graph's operations before it is compiled."""

from __future__ import annotations

import torch
from torch import fx

from specplug.model.compile.linears import fuse_gates, join_linears, use_own_linears
from specplug.model.compile.rope import fuse_rope


def fuse(module: fx.GraphModule, device: torch.device) -> None:
    """Fuses what our kernels for a device compute in one call; on a GPU, Inductor fuses the rest."""
    graph = module.graph
    if device.type == "cuda":
        use_own_linears(graph)
        join_linears(graph)
    else:
        join_linears(graph)
        fuse_gates(graph)
        fuse_rope(graph)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
