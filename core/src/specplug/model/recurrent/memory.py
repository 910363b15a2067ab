"""The memory of one call that carries state: all rows' states, and the inputs of their last tokens."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch

if TYPE_CHECKING:
    from specplug.model.recurrent.batch import StateBatch

Function = Callable[..., Any]
_signature = cache(inspect.signature)


def bind(function: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those for a final `**kwargs` among them."""
    bound = _signature(function).bind(*args, **kwargs).arguments
    return bound | bound.pop("kwargs", {})


@attrs.frozen(eq=False)
class TracedRows:
    """The rows of a forward that is traced: kernels alone can run them.

    Attributes:
        plan: see `StateBatch.plan`.
    """

    plan: torch.Tensor


class StateMemory(torch.nn.Module, ABC):
    """Computes a replaceable function over packed rows, each from its own state.

    What is kept are buffers of a module, so that a compiled forward can be given them as it is given weights.

    A row's state is that after its first tokens. Of the tokens after them, drafts among these, the memory keeps what they
    add to the state ("entries"): the state is brought forward over the accepted ones in the next forward of the row.

    Attributes:
        sequences: the function's arguments that have a value for every token.
        axis: the dimension of tokens in these and in the result.
        has_kernel: whether our kernels compute it on a CPU.
    """

    sequences: ClassVar[tuple[str, ...]]
    axis: ClassVar[int]
    has_kernel: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, sizes: tuple[int, ...], slots: int, held: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that is kept, rows first."""
        return list(self.buffers())

    @staticmethod
    @abstractmethod
    def trace(given: dict[str, Any]) -> tuple[tuple[int, ...], Any]:
        """The sizes of the state and a result of the right shapes, from the arguments of a call on the meta device."""

    @abstractmethod
    def run(self, batch: StateBatch | TracedRows, original: Function, *args: Any, **kwargs: Any) -> Any:
        """The function's result for a packed batch; brings the rows' states forward.

        Args:
            batch: the rows.
            original: the function, for one row and in plain PyTorch.
            args: of the call, the packed batch as one sequence.
            kwargs: of the call.
        """

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def copy(self, source: int, destination: int) -> None:
        """Gives a row the state and entries of another one."""
        for tensor in self.tensors:
            tensor[destination].copy_(tensor[source])


def kernel_plan(batch: StateBatch | TracedRows) -> torch.Tensor | None:
    """The rows as kernels read them; None where PyTorch computes."""
    return batch.plan if isinstance(batch, TracedRows) or batch.is_native else None
