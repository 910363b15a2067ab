"""The loaded adapters of an engine: which are there, in which slots, and which may go."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import attrs

from specplug.errors import CheckpointError, RequestError
from specplug.lora.layers import AdapterLayers
from specplug.lora.request import LoRARequest
from specplug.lora.room import AdapterRoom
from specplug.lora.weights import AdapterWeights, read_adapter


@attrs.define(eq=False)
class LoadedAdapter:
    """An adapter in a slot.

    Attributes:
        request: its name, number and folder.
        slot: where its weights are.
        serial: the number of this load; another load of the same folder has another.
        rank: its largest rank.
        is_pinned: whether it stays until it is removed; else a request for another adapter may take its slot.
        is_removed: whether new requests can no longer use it.
        last_use: grows with every request that uses it.
        users: the requests that use it, as long as somebody holds them.
    """

    request: LoRARequest
    slot: int
    serial: int
    rank: int
    is_pinned: bool = False
    is_removed: bool = False
    last_use: int = 0
    users: weakref.WeakSet[Any] = attrs.field(factory=weakref.WeakSet)

    @property
    def is_in_use(self) -> bool:
        """Whether an unfinished request uses it."""
        return any(not request.is_finished for request in self.users)


class AdapterRegistry:
    """The loaded adapters. Its methods may be called from any thread.

    Args:
        layers: where their weights go.
        room: how many there may be, and of which size.
        between_steps: makes a context in which no forward runs.
    """

    def __init__(
        self, layers: AdapterLayers, room: AdapterRoom, between_steps: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._layers = layers
        self._room = room
        self._slots: list[LoadedAdapter | None] = [None] * room.num_slots
        self._between_steps = between_steps
        self._lock = threading.Lock()  # of the slots and what they hold; taken after that of `between_steps`
        self._serials = itertools.count()
        self._uses = itertools.count(1)

    @property
    def loaded(self) -> list[LoadedAdapter]:
        """The adapters that requests can use, in the order of their numbers."""
        found = [each for each in list(self._slots) if each is not None and not each.is_removed]
        return sorted(found, key=lambda each: each.request.lora_int_id)

    def load(self, request: LoRARequest) -> LoadedAdapter:
        """Loads an adapter, and keeps it until it is removed.

        Raises:
            RequestError: its name or number is in use, or all slots are.
            CheckpointError: it cannot be loaded.
        """
        self._check_new(request)
        weights = self._read(request)
        with self._between_steps(), self._lock:
            return self._put(request, weights, is_pinned=True)

    def load_all(self, requests: Iterable[LoRARequest]) -> None:
        """Loads several; see `load`."""
        for request in requests:
            self.load(request)

    def unload(self, adapter_id: int) -> bool:
        """Removes an adapter; rows that use it end with it. Returns whether it was loaded."""
        with self._lock:
            for each in self.loaded:
                if each.request.lora_int_id == adapter_id:
                    each.is_removed = True
                    return True
        return False

    def assign(self, wanted: LoRARequest | str, sequences: Sequence[Any]) -> LoadedAdapter:
        """The adapter that some sequences use until they are finished; it is loaded if it is not there.

        Args:
            wanted: the adapter, or the name of a loaded one.
            sequences: the `Request`s.

        Raises:
            RequestError: there is no such adapter, its name or number is another one's, it cannot be loaded, or there is no
                room for it.
        """
        with self._lock:
            adapter = self._find(wanted)
            if adapter is not None:
                return self._use(adapter, sequences)
        if isinstance(wanted, str):
            names = ", ".join(each.request.lora_name for each in self.loaded) or "none"
            raise RequestError(f"lora_request: no adapter '{wanted}' is loaded (loaded: {names}); load it first")
        self._check_new(wanted)
        try:
            weights = self._read(wanted)
        except CheckpointError as error:
            raise RequestError(f"lora_request '{wanted.lora_name}': {error}") from error
        with self._between_steps(), self._lock:  # another thread may have loaded it meanwhile
            return self._use(self._find(wanted) or self._put(wanted, weights, is_pinned=False), sequences)

    def _use(self, adapter: LoadedAdapter, sequences: Sequence[Any]) -> LoadedAdapter:
        adapter.last_use = next(self._uses)
        adapter.users.update(sequences)
        return adapter

    def _find(self, wanted: LoRARequest | str) -> LoadedAdapter | None:
        """The loaded adapter of this name, or with the name, number and folder of this request."""
        return next((each for each in self.loaded if wanted in (each.request, each.request.lora_name)), None)

    def _check_new(self, request: LoRARequest) -> None:
        for own in [each.request for each in self.loaded]:
            if request.lora_int_id == own.lora_int_id or request.lora_name == own.lora_name:
                raise RequestError(
                    f"lora_request '{request.lora_name}' (number {request.lora_int_id}): '{own.lora_name}' (number "
                    f"{own.lora_int_id}, {own.lora_path}) is loaded already; unload it first, or take another name and number"
                )

    def _read(self, request: LoRARequest) -> AdapterWeights:
        return read_adapter(self._room.check(request), self._room.dtype)

    def _put(self, request: LoRARequest, weights: AdapterWeights, *, is_pinned: bool) -> LoadedAdapter:
        """Puts an adapter in a slot, between two steps."""
        self._check_new(request)
        slot = self._find_slot(request.lora_name)
        evicted, self._slots[slot] = self._slots[slot], None
        if evicted is not None:
            evicted.is_removed = True
        self._layers.fill(slot, weights)
        adapter = LoadedAdapter(request, slot, next(self._serials), weights.rank, is_pinned, last_use=next(self._uses))
        self._slots[slot] = adapter
        return adapter

    def _find_slot(self, name: str) -> int:
        """A slot that is free, else that of the adapter that was not used for the longest time."""
        free = [
            (-1 if each is None or each.is_removed else each.last_use, slot)
            for slot, each in enumerate(self._slots)
            if each is None or (not each.is_in_use and (each.is_removed or not each.is_pinned))
        ]
        if not free:
            raise RequestError(
                f"there is no room for the adapter '{name}': max_loras={len(self._slots)}, and all are loaded or in "
                "use; unload one, or start with a larger max_loras"
            )
        return min(free)[1]
