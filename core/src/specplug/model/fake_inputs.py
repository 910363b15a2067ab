"""Stand-ins for tensors, by which code is traced for shapes of which some are free."""

from __future__ import annotations

from typing import Any

import torch

# Sizes of free dimensions while code is traced: no two alike, and none that is a size of a model.
EXAMPLE_TOKENS, EXAMPLE_LOGITS, EXAMPLE_PLAN = 7, 5, 93


class FakeInputs:
    """Makes fake tensors of one tracing."""

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self.mode = FakeTensorMode(shape_env=ShapeEnv())

    def fixed(self, tensor: torch.Tensor) -> Any:
        """One whose sizes are part of what is compiled."""
        return self.mode.from_tensor(tensor.detach(), static_shapes=True)

    def free(self, tensor: torch.Tensor, dimension: int) -> Any:
        """One with a dimension that may have any size at every call."""
        from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

        sizes = [DimDynamic.DYNAMIC if index == dimension else DimDynamic.STATIC for index in range(tensor.dim())]
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=sizes)
        return self.mode.from_tensor(tensor, symbolic_context=context)
