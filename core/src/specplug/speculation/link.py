"""One speculator of an engine's chain, and what the engine remembers of its dealings with it."""

from __future__ import annotations

import attrs

from specplug.contract.types import EndReason, Outcome
from specplug.plugins.registry import RegisteredSpeculator


@attrs.define(eq=False)
class ChainLink:
    """One speculator of the chain and what the engine remembers about it.

    Attributes:
        speculator: the plugin's object and hooks.
        delivered: request number → first position whose state it has not seen. A request not in here is new to it.
        forked: number of a fork, or of a row that began in the prefix cache → first position whose state its speculator had not
            been given then.
        parents: number of a fork that it has not seen → number of the request it was forked from, while that keeps its slot.
        resumed: numbers of rows that began in the prefix cache and that it has not seen.
        stored: request number → how many of its first positions it was given without a gap, those of the prefix cache included.
        outcomes: request number → what became of its own last proposal, until it is told.
        banned: numbers of requests that do not return to it after a fault.
        ended: (slot, reason) it has not been told of.
        faults: faults in all.
        faults_in_a_row: since its last good call.
        enabled: whether it is still asked.
        seconds: spent in its `propose`.
        is_told_slow: whether the user was warned that it is slow.
    """

    speculator: RegisteredSpeculator
    delivered: dict[int, int] = attrs.field(factory=dict)
    forked: dict[int, int] = attrs.field(factory=dict)
    parents: dict[int, int] = attrs.field(factory=dict)
    resumed: set[int] = attrs.field(factory=set)
    stored: dict[int, int] = attrs.field(factory=dict)
    outcomes: dict[int, Outcome] = attrs.field(factory=dict)
    banned: set[int] = attrs.field(factory=set)
    ended: list[tuple[int, EndReason]] = attrs.field(factory=list)
    faults: int = 0
    faults_in_a_row: int = 0
    enabled: bool = True
    seconds: float = 0.0
    is_told_slow: bool = False
