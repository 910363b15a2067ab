"""The recurrent states of a model's rows: memory per row, next to the KV cache's memory per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from specplug import native
from specplug.model.recurrent.batch import StateBatch, StateRow
from specplug.model.recurrent.layers import StateCall
from specplug.model.recurrent.memory import StateMemory, TracedRows
from specplug.model.recurrent.rebind import called_functions, rebind, restore
from specplug.model.rows import ForwardRow


class StateSite:
    """The calls of one module, in the order in which it makes them."""

    def __init__(self, memories: Sequence[StateMemory]) -> None:
        self.memories = memories
        self.batch: StateBatch | TracedRows | None = None
        self._next = 0

    def start(self, batch: StateBatch | TracedRows | None) -> None:
        """Sets the batch of the next forward."""
        self.batch, self._next = batch, 0

    def replacement(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """What the module calls in place of a function."""

        def run(*args: Any, **kwargs: Any) -> Any:
            assert self.batch is not None, "the runner sets the batch before it calls the model"
            memory, self._next = self.memories[self._next], self._next + 1
            return memory.run(self.batch, original, *args, **kwargs)

        return run


class StateStore:
    """The states of a model's rows, by slot.

    For every slot it knows the position that the state is at and which entries follow it, so that a forward that begins
    anywhere among these can be served: after a rejected draft, the next forward simply begins earlier. One that begins
    elsewhere raises, and so does a row whose last forward failed, until it begins at 0 again.

    Attributes:
        slots: rows.
        held: the most entries of a row: tokens whose acceptance is not known when they run.

    Args:
        model: the model, whose modules get functions of their own.
        calls: of the architecture.
        slots: see above.
        held: see above.
        dtype: of the model.
        device: of the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        calls: Sequence[StateCall],
        slots: int,
        held: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots = slots
        self.held = held
        self._device = device
        self._dtype = dtype
        self._bases = [-1] * slots
        self._entries: list[Sequence[int]] = [()] * slots
        self._sites: list[StateSite] = []
        self._bound: list[tuple[torch.nn.Module, dict[str, Callable[..., Any]]]] = []
        for name in dict.fromkeys(call.module for call in calls):
            own = [call for call in calls if call.module == name]
            module = model.get_submodule(name)
            site = StateSite([call.allocate(slots, held, dtype, device) for call in own])
            functions = called_functions(module, {call.function for call in own})
            own_functions = {name: site.replacement(function) for name, function in functions.items()}
            rebind(module, own_functions)
            self._sites.append(site)
            self._bound.append((module, own_functions))

    @property
    def memories(self) -> list[StateMemory]:
        """Of all calls, in the order of the modules."""
        return [memory for site in self._sites for memory in site.memories]

    @property
    def num_bytes(self) -> int:
        """Bytes of all memories."""
        return sum(memory.num_bytes for memory in self.memories)

    @property
    def is_native(self) -> bool:
        """Whether our kernels run the rows, in those layers that have one."""
        return self._device.type == "cpu" and self._dtype in (torch.float32, torch.bfloat16) and native.available()

    @property
    def has_all_kernels(self) -> bool:
        """Whether they do in all layers, so that a forward can be compiled."""
        return self.is_native and all(memory.has_kernel for memory in self.memories)

    @property
    def module(self) -> torch.nn.Module:
        """Has all memories as its buffers."""
        return torch.nn.ModuleList(self.memories)

    @contextmanager
    def over(self, batch: StateBatch | TracedRows) -> Iterator[None]:
        """Within it, the model's layers run these rows."""
        for site in self._sites:
            site.start(batch)
        try:
            yield
        finally:
            for site in self._sites:
                site.start(None)

    @contextmanager
    def running(self, rows: Sequence[ForwardRow]) -> Iterator[StateBatch]:
        """Within it, the model's layers run these rows from where their states are.

        Raises:
            RuntimeError: a row begins where its state cannot be brought to.
        """
        first, states = 0, []
        for row in rows:
            states.append(self._row(row, first))
            first += len(row.tokens)
        batch = StateBatch(states, self.held, self._device, is_native=self.is_native)
        for state in states:  # not known if the forward fails in the middle
            self._bases[state.slot] = -1
        with self.over(batch):
            yield batch
        for row, state in zip(rows, states, strict=True):
            self._bases[state.slot] = row.start + state.count - state.width
            self._entries[state.slot] = range(state.width)

    def _row(self, row: ForwardRow, first: int) -> StateRow:
        if row.slot < 0:
            raise RuntimeError("a row of a model with recurrent state needs a slot")
        is_fresh = row.start == 0
        base, entries = (0, ()) if is_fresh else (self._bases[row.slot], self._entries[row.slot])
        if not is_fresh and not self.reaches(row.slot, row.start):
            raise RuntimeError(
                f"the recurrent state of slot {row.slot} is at {base}, {len(entries)} tokens follow, and a forward "
                f"begins at {row.start}"
            )
        count = len(row.tokens)
        known = row.start - base  # entries before the new tokens
        following = max(base, row.start + count - min(row.held, self.held))  # where the state will be
        ahead = following - base
        assert row.tree is None or following == row.start, "a tree begins at the first token that is not passed"
        return StateRow(
            slot=row.slot,
            is_fresh=is_fresh,
            first=first,
            count=count,
            replayed=entries[: min(ahead, known)],
            remaining=entries[min(ahead, known) : known],
            passed=max(0, following - row.start),
            ancestors=None if row.tree is None else row.tree.visible.numpy(),
        )

    def keep(self, slot: int, entries: Sequence[int]) -> None:
        """After verification: the row's tokens after its state are these entries, in order; the others are dropped."""
        self._entries[slot] = entries

    def reaches(self, slot: int, position: int) -> bool:
        """Whether a forward of a row may begin at a position."""
        base = self._bases[slot]
        return 0 <= base <= position <= base + len(self._entries[slot])

    def copy(self, source: int, destination: int) -> None:
        """Gives a row the state of another one, for a fork."""
        self._bases[destination] = self._bases[source]
        self._entries[destination] = self._entries[source]
        for memory in self.memories:
            memory.copy(source, destination)

    @contextmanager
    def unbound(self) -> Iterator[None]:
        """Lets the model run by its own functions, over one sequence from its beginning."""
        for module, _ in self._bound:
            restore(module)
        try:
            yield
        finally:
            for module, functions in self._bound:
                rebind(module, functions)

    def close(self) -> None:
        """Gives the modules their own functions back."""
        for module, _ in self._bound:
            restore(module)
        self._sites.clear()
        self._bound.clear()
