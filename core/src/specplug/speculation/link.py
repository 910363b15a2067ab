"""One speculator of an engine's chain: what it was told of each row, and what it is told next."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from specplug.contract.types import Budget, EndReason, Outcome, ProposalBatch, ProposalRow
from specplug.model.pending import UpcomingTokens
from specplug.plugins.registry import RegisteredSpeculator
from specplug.speculation.draft_length import DraftLengthPolicy
from specplug.speculation.row import Row
from specplug.speculation.target_states.ring_buffer import Captured
from specplug.speculation.target_states.store import TOP_IDS, TOP_PROBS, TargetStateStore


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

    def fork(self, parent: Row, child: Row) -> None:
        """Notes how much of a fork's shared part the speculator has been given; what it stored for that, the fork has too."""
        if parent.number not in self.banned:
            self.forked[child.number] = min(self.delivered.get(parent.number, 0), child.num_forked_tokens)
            self.parents[child.number] = parent.number
            self.stored[child.number] = min(self.stored.get(parent.number, 0), child.num_forked_tokens)

    def resume(self, request: Row, count: int) -> None:
        """Notes how many positions of a row the speculator has in the prefix cache."""
        if count and request.number not in self.banned:
            self.forked[request.number] = self.stored[request.number] = count
            self.resumed.add(request.number)

    def end(self, request: Row, slot: int, reason: EndReason) -> None:
        """Notes that a row left its slot; a speculator that knew it is told at its next call."""
        self.forked.pop(request.number, None)
        self.stored.pop(request.number, None)
        self.resumed.discard(request.number)
        self.parents = {c: p for c, p in self.parents.items() if request.number not in (c, p)}
        self.outcomes.pop(request.number, None)
        if self.delivered.pop(request.number, None) is not None:
            self.ended.append((slot, reason))
        if reason != "preempted":
            self.banned.discard(request.number)

    def make_batch(
        self,
        requests: Sequence[Row],
        budgets: Sequence[Budget],
        states: TargetStateStore,
        policy: DraftLengthPolicy,
        *,
        uses_scores: bool,
        upcoming: Sequence[UpcomingTokens] | None = None,
        stops: Sequence[int] | None = None,
    ) -> ProposalBatch:
        """What the speculator is asked, and told: from now on it counts as delivered.

        Args:
            requests: the rows that it is shown.
            budgets: what each may draft.
            states: the target states.
            policy: told of rows whose states are lost.
            uses_scores: see `ProposalBatch`.
            upcoming: see `ProposalRow`, for each row; None if the tokens are known.
            stops: then, for each row, the position after those whose states it may get. Call `settle` when they are known.
        """
        traits = self.speculator.traits
        spans: list[tuple[int, range]] = []
        new: list[bool] = []
        forked: list[bool] = []
        cached: list[int] = []
        ends = [request.num_computed for request in requests] if stops is None else stops
        for request, stop in zip(requests, ends, strict=True):
            start = self.delivered.get(request.number)
            new.append(start is None)
            if start is None:
                start = self.forked.pop(request.number, 0)
            shared, parent = start, self.parents.pop(request.number, None)
            if traits.needs_states:
                kept = min(states.available_from(request.slot, start), stop)
                if kept > start:
                    policy.lose_states(self.speculator, request)
                start = kept
            spans.append((request.slot, range(start, stop)))
            forked.append(parent is not None and 0 < start == shared)
            cached.append(start if request.number in self.resumed and start == shared else 0)
            self.resumed.discard(request.number)
            if start <= self.stored.get(request.number, 0):
                self.stored[request.number] = stop
            self.delivered[request.number] = stop
        if traits.needs_states:
            channels, places = states.deliver(spans)
        else:
            channels, places = {}, [slice(0, 0)] * len(spans)
        ended, self.ended = self.ended, []
        outcomes = [self.outcomes.pop(r.number, self._outcome_of_another(r)) for r in requests]
        drafted, nodes = self._deliver_drafted(requests, outcomes, states)
        rows = [
            ProposalRow(
                row_id=request.slot,
                is_new=is_new,
                tokens=request.view,
                new_positions=span,
                new_states=place,
                budget=budget,
                sampling=request.params,
                outcome=outcome,
                drafted=own_nodes,
                table=request.table,
                num_prompt_tokens=request.num_prompt_tokens,
                forked_from=request.forked_from if is_fork else None,
                num_cached_tokens=num_cached,
                upcoming=own_upcoming,
                generator=request.randomness.draft_generator,
            )
            for request, (_, span), place, budget, is_new, is_fork, num_cached, outcome, own_nodes, own_upcoming in zip(
                requests,
                spans,
                places,
                budgets,
                new,
                forked,
                cached,
                outcomes,
                nodes,
                [None] * len(spans) if upcoming is None else upcoming,
                strict=True,
            )
        ]
        k = traits.top_k
        return ProposalBatch(
            rows=rows,
            ended=ended,
            hidden_states={boundary: channels[boundary] for boundary in traits.hidden_states},
            top_ids=channels[TOP_IDS][:, :k] if k else None,
            top_probs=channels[TOP_PROBS][:, :k] if k else None,
            drafted_top_ids=drafted[TOP_IDS][:, :k] if drafted else None,
            drafted_top_probs=drafted[TOP_PROBS][:, :k] if drafted else None,
            uses_scores=uses_scores,
        )

    def settle(self, requests: Sequence[Row]) -> None:
        """Takes in how far rows came that were delivered with tokens that might come."""
        for request in requests:
            if request.number in self.delivered:
                self.delivered[request.number] = min(self.delivered[request.number], request.num_computed)
                if request.number in self.stored:
                    self.stored[request.number] = min(self.stored[request.number], request.num_computed)

    def _deliver_drafted(
        self, requests: Sequence[Row], outcomes: Sequence[Outcome | None], states: TargetStateStore
    ) -> tuple[Captured, list[slice]]:
        """The top-k at the nodes of the drafts that rows are told the outcome of, where the last step verified them."""
        if not self.speculator.traits.top_k_at_drafts:
            return {}, [slice(0, 0)] * len(requests)
        return states.deliver_drafted(
            [r.slot if o is not None and o is r.outcome else None for r, o in zip(requests, outcomes, strict=True)]
        )

    def _outcome_of_another(self, request: Row) -> Outcome | None:
        """What became of another speculator's proposal; one of the same method would be taken for the speculator's own."""
        outcome = request.outcome
        return None if outcome is None or outcome.method == self.speculator.method else outcome
