"""Steps that start before the tokens of the last one are known: the device draws them, and the next forward takes them there.

Rows qualify while nobody drafts for them and nothing about their next token needs the host (`draws_ahead`). What the host
learns, it learns one step late: a row that has ended by then has run one token too many, which is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

from specplug.engine.commit import Committed, commit_tokens
from specplug.engine.target_step import TargetStep
from specplug.errors import ModelOutputError
from specplug.model.pending import PendingRow, PendingTokens
from specplug.request import Request, StepOutput
from specplug.sampling.distributions import nan_message
from specplug.speculation.chain import SpeculatorChain
from specplug.speculation.target_states.store import TargetStateStore
from specplug.speculation.verification.ahead import draws_ahead
from specplug.speculation.verification.dispatch import Verification


class RunAhead:
    """The tokens in flight: drawn on the device, and not committed yet.

    Args:
        pending: where they are on the device; None if steps never run ahead.
        chain: the speculators.
        verification: draws them.
        states: the target states that speculators declared.
    """

    def __init__(
        self,
        pending: PendingTokens | None,
        chain: SpeculatorChain,
        verification: Verification,
        states: TargetStateStore,
    ) -> None:
        self._pending = pending
        self._chain = chain
        self._verification = verification
        self._states = states
        self._drawn: list[tuple[Request, PendingRow]] = []

    def __bool__(self) -> bool:
        return bool(self._drawn)

    def takes(self, target: TargetStep) -> bool:
        """Whether the next step can start before the host knows the tokens of this one."""
        return (
            self._pending is not None
            and bool(target.requests)
            and not target.scored
            and self._verification.is_unobserved
            and all(draws_ahead(request) for request in target.requests)
            and self._chain.rests([row.request for row in target.rows if row.request.slot >= 0])
        )

    def draw(self, target: TargetStep) -> None:
        """Draws every row's next token on the device, where the next forward takes it from, and has it sent to the host."""
        assert self._pending is not None
        tokens = self._verification.draw(target.requests, target.logits[: target.offsets[-1]])
        drawn = self._pending.put(tokens[:, None], [1] * len(tokens))
        self._pending.fetch()
        self._drawn = list(zip(target.requests, drawn, strict=True))
        for request, token in self._drawn:
            if not request.is_finished:
                request.in_flight = token.placeholders[0]
        final: dict[int, tuple[range, list[int]]] = {}
        for row, first in zip(target.rows, target.first, strict=True):
            request = row.request
            if request.slot >= 0:
                start, request.num_computed = request.num_computed, request.num_computed + row.num_tokens
                final[request.slot] = (range(start, request.num_computed), list(range(first, first + row.num_tokens)))
        self._states.record(target.captured, final, {})
        self._chain.rest()

    def settle(self) -> Iterator[Committed | StepOutput]:
        """Commits the tokens; waits until the host has them."""
        drawn, self._drawn = self._drawn, []
        for request, token in drawn:
            if request.in_flight is None:  # it ended meanwhile
                continue
            request.in_flight = None
            (found,) = token.read()
            if token.error is None:
                yield commit_tokens(request, (), found)
            else:
                request.fail(ModelOutputError(nan_message(request.id, len(request.tokens))))
                yield StepOutput(request, [], [], [])

    def forget(self) -> None:
        """Drops the tokens, of rows that are computed anew."""
        self._drawn = []
