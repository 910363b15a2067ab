"""How many adapters an engine has room for, and what that takes: planned from configurations and headers alone."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from specplug.errors import CheckpointError, ConfigurationError
from specplug.lora.layers import AdapterLayers
from specplug.lora.request import LoRARequest
from specplug.lora.weights import AdapterFiles, inspect_adapter
from specplug.model.linears import LinearLayer

DEFAULT_MAX_LORAS = 4
DEFAULT_MAX_LORA_RANK = 16


@attrs.frozen
class AdapterRoom:
    """Room for adapters.

    Attributes:
        targets: the layers of the target that an adapter can be added to.
        model: the target's class.
        num_slots: the most adapters.
        rank: the largest rank.
        dtype: of their weights.
    """

    targets: Sequence[LinearLayer]
    model: str
    num_slots: int
    rank: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return AdapterLayers.planned_bytes(self.targets, self.num_slots, self.rank, self.dtype)

    def allocate(self, model: torch.nn.Module, device: torch.device) -> AdapterLayers:
        """The layers of a loaded target, with empty slots."""
        return AdapterLayers(model, self.targets, self.num_slots, self.rank, self.dtype, device)

    def check(self, request: LoRARequest) -> AdapterFiles:
        """An adapter's files.

        Raises:
            CheckpointError: it is not an adapter for this target, or its rank is too large.
        """
        files = inspect_adapter(request.lora_path, self.targets, self.model)
        if files.rank > self.rank:
            raise CheckpointError(
                f"{files.folder} has rank {files.rank}, and max_lora_rank is {self.rank}; start with max_lora_rank={files.rank}"
            )
        return files


def plan_room(
    modules: Sequence[LoRARequest],
    max_loras: int | None,
    max_lora_rank: int | None,
    targets: Sequence[LinearLayer],
    model: str,
    dtype: torch.dtype,
) -> AdapterRoom:
    """The room for the adapters of a configuration.

    Args:
        modules: those that are loaded at the start.
        max_loras: the most at once; None makes room for `modules`, and for four at least.
        max_lora_rank: the largest rank; None takes that of `modules`, and 16 at least.
        targets: the layers of the target that an adapter can be added to.
        model: the target's class.
        dtype: of the target.

    Raises:
        ConfigurationError: more modules than `max_loras`.
        CheckpointError: one of them is not an adapter for this target, or its rank is too large.
    """
    if not targets:
        raise ConfigurationError(f"{model} has no linear layer that an adapter can be added to; leave enable_lora out")
    slots = max(len(modules), DEFAULT_MAX_LORAS) if max_loras is None else max_loras
    if slots < len(modules):
        raise ConfigurationError(f"max_loras={slots} is less than the {len(modules)} lora_modules; raise it")
    if max_lora_rank is None:
        ranks = [inspect_adapter(module.lora_path, targets, model).rank for module in modules]
        return AdapterRoom(targets, model, slots, max([DEFAULT_MAX_LORA_RANK, *ranks]), dtype)
    room = AdapterRoom(targets, model, slots, max_lora_rank, dtype)
    for module in modules:
        room.check(module)
    return room
