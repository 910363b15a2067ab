"""Kept states are those of the positions they are given out for, whatever rows do in between."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from specplug.native import library
from specplug.speculation.target_states import deferred_copies
from specplug.speculation.target_states.deferred_copies import DeferredCopies
from specplug.speculation.target_states.ring_buffer import WINDOW, Channel, ChannelSpec, copy_states, copy_steps
from specplug.speculation.target_states.store import TargetStateStore
from support.marks import slow_except

CPU = torch.device("cpu")
SPECS: dict[Channel, ChannelSpec] = {1: ChannelSpec(3, torch.float32), "final": ChannelSpec(2, torch.bfloat16)}
SLOTS = 3


def value(sequence: int, position: int) -> float:
    """What the state of a position holds; small enough for bfloat16."""
    return float((sequence * 37 + position) % 251)


@pytest.fixture(params=["kernels", "PyTorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "PyTorch":
        monkeypatch.setattr(library, "available", lambda: False)
    elif not library.load():
        pytest.skip("no kernels on this machine")
    return request.param


@pytest.mark.parametrize("seed", slow_except(range(12), *range(4)))
def test_what_is_delivered_is_what_was_computed(way: str, seed: int) -> None:
    """Rows sleep, wake, end and draft in steps small and large; what is there reaches back as far as is promised."""
    choose = random.Random(seed)
    store = TargetStateStore(SPECS, SLOTS, 400, CPU)
    sequences, lengths, seen = list(range(SLOTS)), [0] * SLOTS, [0] * SLOTS
    asleep_since = [0] * SLOTS  # steps
    delivered = longest = 0
    for step in range(1, 700):
        advance = [choose.choice([1, 1, 1, 1, choose.choice([2, 5, 90])]) for _ in range(SLOTS)]
        rejected = choose.choice([0, 0, 0, 2, 9])
        packed = [(s, lengths[s] + at) for s in range(SLOTS) for at in range(advance[s])]
        places = list(range(len(packed) + rejected))
        choose.shuffle(places)
        states = torch.full((len(places), 3), -1.0)
        rows: dict[int, tuple[range, list[int]]] = {
            s: (range(lengths[s], lengths[s] + advance[s]), []) for s in range(SLOTS)
        }
        for (slot, position), place in zip(packed, places, strict=False):
            states[place] = value(sequences[slot], position)
            rows[slot][1].append(place)
        store.record({1: states, "final": states[:, :2].bfloat16()}, rows)
        for slot in range(SLOTS):
            lengths[slot] += advance[slot]
        unseen = []
        for slot in range(SLOTS):
            if choose.random() > 0.04 or (slot == 0 and step % 200):
                unseen.append(slot)
                continue
            first = store.available_from(slot, seen[slot])
            positions = range(first, lengths[slot])
            channels, (where,) = store.deliver([(slot, positions)])
            expected = torch.tensor([value(sequences[slot], position) for position in positions])
            for states_there in channels.values():
                assert torch.equal(states_there[where].float(), expected[:, None].expand(-1, states_there.shape[1]))
            assert first == seen[slot] or len(positions) >= min(step - asleep_since[slot], WINDOW // 2)
            delivered += len(positions)
            longest = max(longest, len(positions))
            seen[slot], asleep_since[slot] = lengths[slot], step
            store.drop(slot)
            if choose.random() < 0.3:
                sequences[slot], lengths[slot], seen[slot] = max(sequences) + 1, 0, 0
        store.keep(unseen)
        store.end_step()
    assert delivered > 1000
    assert longest >= WINDOW


def test_small_steps_wait_for_each_other(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 there are three copies; a slot that goes to another row meanwhile gives out none of the first one's."""
    copies: list[int] = []

    def count(steps: Sequence[Any], destinations: Sequence[torch.Tensor]) -> None:
        copies.append(len(steps))
        copy_steps(steps, destinations)

    monkeypatch.setattr(deferred_copies, "copy_steps", count)
    store = TargetStateStore(SPECS, SLOTS, 400, CPU)
    lengths = [0, 5]
    sequences = [0, 1]
    for step in range(200):
        if step == 101:  # while some wait
            store.drop(1)
            sequences[1], lengths[1] = 2, 9
        states = torch.tensor([[value(sequences[slot], lengths[slot])] * 3 for slot in (1, 0)])
        store.record(
            {1: states, "final": states[:, :2].bfloat16()},
            {slot: (range(lengths[slot], lengths[slot] + 1), [1 - slot]) for slot in (0, 1)},
        )
        lengths = [length + 1 for length in lengths]
        store.keep([0, 1])
        store.end_step()
        if step == 23:
            assert copies == [8, 8, 8]
        for slot, first in ((0, 150), (1, lengths[1] - 20)):
            if step == 190 or (slot == 1 and step == 103):
                first = max(first, 9)
                assert store.available_from(slot, first) == first
                channels, (where,) = store.deliver([(slot, range(first, lengths[slot]))])
                expected = torch.tensor([value(sequences[slot], position) for position in range(first, lengths[slot])])
                for there in channels.values():
                    assert torch.equal(there[where].float(), expected[:, None].expand(-1, there.shape[1]))
                assert store.available_from(slot, 0) >= (9 if slot else 0)
    assert max(copies) == 8


def test_a_step_that_puts_nothing_aside_hides_nothing_of_the_others(way: str) -> None:
    """What lies behind it in the buffer is written over a lap later, and no longer given out then."""
    held = DeferredCopies(SPECS, SLOTS, CPU)
    for step in range(500):
        states = torch.full((1, 3), value(0, step))
        slot = 1 if step <= 5 else 0
        held.add(
            {1: states, "final": states[:, :2].bfloat16()},
            {slot: (range(step, step + 1), [0])},
            [2] if step == 0 else [slot],
        )
    assert held.take_out(1) is None
    positions, places, _ = held.take_out(0) or (range(0), [], False)
    assert positions == range(500 - WINDOW, 500)
    assert held.buffers[1][places, 0].tolist() == [value(0, position) for position in positions]


def test_states_are_copied_whatever_their_type_and_layout(way: str) -> None:
    wide = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    sources: dict[Channel, torch.Tensor] = {1: wide, "final": wide.t().contiguous().t()[:, 2:]}
    kept = {channel: torch.zeros(5, spec.width, dtype=spec.dtype) for channel, spec in SPECS.items()}
    for read, write in (([4, 0], [1, 3]), ([2, 3], [0, 1])):
        copy_states(SPECS, sources, read, kept, write)
        for channel, buffer in kept.items():
            expected = sources[channel][read][:, : buffer.shape[1]].to(buffer.dtype)
            assert torch.equal(buffer[write], expected)


@pytest.mark.parametrize(
    ("counts", "read", "write"),
    [
        ([1], [6], [0]),
        ([1], [-1], [0]),
        ([1], [0], [5]),
        ([2], [0, 1], [0]),
        ([1], [0, 1], [0, 1]),
        ([3, -1], [0, 1], [0, 1]),
        ([1, 1], [0, 1], [0, 1]),
    ],
)
def test_no_row_beyond_a_matrix_is_touched(counts: list[int], read: list[int], write: list[int]) -> None:
    if not library.load():
        pytest.skip("no kernels on this machine")
    with pytest.raises(RuntimeError, match="copy_rows"):
        torch.ops.specplug.copy_rows([torch.zeros(6, 3)], counts, read, [torch.zeros(5, 3)], write)
