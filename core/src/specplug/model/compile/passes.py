"""What a traced graph's operations are put together to, before it is compiled."""

from __future__ import annotations

import torch
from torch import fx

from specplug.model.compile.linears import gate_products, join_products, take_products
from specplug.model.compile.rope import take_rotations


def fuse(module: fx.GraphModule, device: torch.device) -> None:
    """Puts together what our kernels for a device do at once; a GPU's compiler puts the rest together itself."""
    graph = module.graph
    if device.type == "cuda":
        take_products(graph)
        join_products(graph)
    else:
        join_products(graph)
        gate_products(graph)
        take_rotations(graph)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
