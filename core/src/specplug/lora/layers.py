"""The low-rank layers of a target: room for several adapters, and their part of a forward.

Several adapters run in one batch. A batch of packed rows has segments (first token, end, slot), and every adapted layer adds
to the tokens of a segment what the adapter in that slot says. The target's own layers stay as they are, and while no row of a
batch has an adapter nothing is in their way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from specplug import native
from specplug.lora.weights import AdapterWeights, LowRank
from specplug.model.linears import LinearLayer
from specplug.model.rows import ForwardRow


class AdaptedLinear(nn.Module):
    """A linear layer with room for adapters.

    Args:
        linear: the target's layer; it is not part of this module.
        layer: its sizes.
        num_slots: how many adapters there is room for.
        rank: of the largest.
        dtype: of their weights.
        device: where they are.
    """

    down: torch.Tensor
    up: torch.Tensor
    ranks: torch.Tensor

    def __init__(
        self, linear: nn.Module, layer: LinearLayer, num_slots: int, rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.__dict__["linear"] = linear
        down = torch.zeros(num_slots, rank, layer.in_features, dtype=dtype, device=device)
        up = torch.zeros(num_slots, rank, layer.out_features, dtype=dtype, device=device)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        ranks = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.register_buffer("ranks", ranks, persistent=False)
        self.slot_ranks = [0] * num_slots
        self.segments: torch.Tensor | None = None
        self._is_native = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
        self._own = vars(linear).get("forward")  # a library's, of quantised layers for example

    @staticmethod
    def planned_bytes(layer: LinearLayer, num_slots: int, rank: int, dtype: torch.dtype) -> int:
        """Bytes of one."""
        width = layer.in_features + layer.out_features
        return num_slots * (rank * width * dtype.itemsize + torch.int32.itemsize)

    def attach(self, segments: torch.Tensor) -> None:
        """Takes the place of the linear's forward."""
        self.segments = segments
        vars(self.linear)["forward"] = self.forward

    def detach(self) -> None:
        """Gives it back."""
        self.segments = None
        if self._own is None:
            vars(self.linear).pop("forward", None)
        else:
            vars(self.linear)["forward"] = self._own

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]: the linear's own output, and what the adapter of each token adds."""
        linear: Any = self.linear
        output: torch.Tensor = type(linear).forward(linear, states) if self._own is None else self._own(states)
        assert self.segments is not None
        if self._is_native and states.dtype == output.dtype == self.down.dtype and native.available():
            return torch.ops.specplug.add_low_rank(output, states, self.down, self.up, self.ranks, self.segments)
        return self._add(output, states)

    def _add(self, output: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The same with PyTorch's operations."""
        assert self.segments is not None
        result = output.reshape(-1, output.shape[-1]).clone()
        rows = states.reshape(-1, states.shape[-1])
        for begin, end, slot in self.segments.tolist():
            rank = self.slot_ranks[slot]
            if rank:
                inner = rows[begin:end].to(self.down.dtype) @ self.down[slot, :rank].t()
                result[begin:end] += (inner @ self.up[slot, :rank]).to(result.dtype)
        return result.view(output.shape)


class AdapterLayers(nn.Module):
    """The adapted layers of a target.

    Args:
        model: the target, with its weights; it is not part of this module.
        layers: those that an adapter can be added to.
        num_slots: how many adapters there is room for.
        rank: of the largest.
        dtype: of their weights.
        device: where the target is.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LinearLayer],
        num_slots: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.names = [layer.name for layer in layers]
        self.linears = nn.ModuleList(
            AdaptedLinear(model.get_submodule(layer.name), layer, num_slots, rank, dtype, device) for layer in layers
        )

    @staticmethod
    def planned_bytes(layers: Sequence[LinearLayer], num_slots: int, rank: int, dtype: torch.dtype) -> int:
        """Bytes of all slots."""
        return sum(AdaptedLinear.planned_bytes(layer, num_slots, rank, dtype) for layer in layers)

    @torch.inference_mode()
    def fill(self, slot: int, weights: AdapterWeights | None) -> None:
        """Puts an adapter in a slot; None empties it. No forward may run meanwhile."""
        for name, linear in zip(self.names, self._linears(), strict=True):
            own = None if weights is None else weights.layers.get(name)
            rank = 0 if own is None else len(own.down)
            if own is not None:
                linear.down[slot, :rank].copy_(own.down)
                linear.up[slot, :rank].copy_(own.up)
            linear.ranks[slot] = linear.slot_ranks[slot] = rank

    def fill_randomly(self, slot: int) -> None:
        """Puts numbers in a slot that change every layer a little, for comparing two ways to compute."""
        generator = torch.Generator().manual_seed(0)
        layers = {}
        for name, linear in zip(self.names, self._linears(), strict=True):
            down, up = (
                torch.randn(each.shape[1:], generator=generator, dtype=torch.float32, device="cpu")
                / each.shape[2] ** 0.5
                for each in (linear.down, linear.up)
            )
            layers[name] = LowRank(down, up)
        self.fill(slot, AdapterWeights(layers, 0))

    @staticmethod
    def segments(rows: Sequence[ForwardRow]) -> torch.Tensor | None:
        """(first token, end, slot) of the adapted tokens of packed rows, neighbours with one adapter together: int32 [S, 3].

        None if no row has an adapter.
        """
        found: list[tuple[int, int, int]] = []
        end = 0
        for row in rows:
            begin, end = end, end + len(row.tokens)
            if row.adapter < 0 or begin == end:
                continue
            if found and found[-1][1:] == (begin, row.adapter):
                begin = found.pop()[0]
            found.append((begin, end, row.adapter))
        return torch.tensor(found, dtype=torch.int32, device="cpu") if found else None

    @contextmanager
    def applied(self, segments: torch.Tensor, *, to_all: bool = False) -> Iterator[None]:
        """Within it, the target's linears are the adapted ones.

        Args:
            segments: as above.
            to_all: also the layers that no adapter of the segments changes.
        """
        touched = self._linears()
        if not to_all:
            slots = set(segments[:, 2].tolist())
            touched = [linear for linear in touched if any(linear.slot_ranks[slot] for slot in slots)]
        try:
            for linear in touched:
                linear.attach(segments)
            yield
        finally:
            for linear in touched:
                linear.detach()

    def _linears(self) -> list[AdaptedLinear]:
        return list(self.linears)  # type: ignore[arg-type]  # a ModuleList is one of Modules
