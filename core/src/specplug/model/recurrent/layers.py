"""What a model keeps per row, as the trace of its architecture found it."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from specplug.model.recurrent.memory import StateMemory
from specplug.model.recurrent.pieces import PIECES


@attrs.frozen
class StateCall:
    """One call of a replaceable function that carries state from token to token.

    Attributes:
        module: the module that makes it.
        function: the function's name.
        sizes: of its state; what they mean is the business of the function's `StateMemory`.
    """

    module: str
    function: str
    sizes: tuple[int, ...]

    def allocate(self, slots: int, held: int, dtype: torch.dtype, device: torch.device) -> StateMemory:
        """The memory of this call.

        Args:
            slots: rows.
            held: tokens of a row whose inputs are kept.
            dtype: of the model.
            device: of the model.
        """
        return PIECES[self.function](self.sizes, slots, held, dtype, device)


def bytes_per_row(calls: Sequence[StateCall], held: int, dtype: torch.dtype) -> int:
    """Bytes that a row takes in all calls; see `StateCall.allocate`."""
    return sum(call.allocate(1, held, dtype, torch.device("meta")).num_bytes for call in calls)
