"""What a traced graph's operations are put together to, before it is compiled."""

from __future__ import annotations

import torch
from torch import fx

from specplug.model.gates import gate_products
from specplug.model.products import join_products, take_products
from specplug.model.rotations import take_rotations


def fuse(module: fx.GraphModule, device: torch.device) -> None:
    """Puts together what our kernels for a device do at once; a GPU's compiler puts the rest together itself."""
    if device.type == "cuda":
        take_products(module)
        join_products(module)
    else:
        join_products(module)
        gate_products(module)
        take_rotations(module)
