"""Drafts that start before the host knows what verification accepted: the host's work then overlaps with drafting.

Where all rows are greedy and their drafts are on the device, verification is a comparison there. Its result is where a loop of
drafts (`Resources.compile_loop`) finds it, so that the device goes on from the target's forward to verification to drafting
while the host waits for the first, commits, and prepares the next step.
"""

from __future__ import annotations

import itertools
import logging

import attrs

from specplug.contract.verification import Verdict
from specplug.engine.scheduler import Scheduler
from specplug.engine.target_step import TargetStep
from specplug.errors import ModelOutputError
from specplug.model.pending import PendingTokens, UpcomingTokens
from specplug.request import Request
from specplug.sampling.distributions import nan_message
from specplug.speculation.chain import SpeculatorChain
from specplug.speculation.draft_length import Length
from specplug.speculation.early import EarlyProposal
from specplug.speculation.link import ChainLink
from specplug.speculation.target_states.store import TargetStateStore
from specplug.speculation.verification.dispatch import Verification

logger = logging.getLogger("specplug")


@attrs.frozen(eq=False)
class EarlyStep:
    """A step whose drafts for the next one are being made.

    Attributes:
        requests: its rows.
        upcoming: for each, what verification has decided.
        proposal: the drafts.
    """

    requests: list[Request]
    upcoming: list[UpcomingTokens]
    proposal: EarlyProposal

    def verdict(self) -> Verdict:
        """What verification decided; waits for the device. A row whose logits were NaN has failed."""
        accepted, next_tokens = [], []
        for request, own in zip(self.requests, self.upcoming, strict=True):
            *path, token = own.read()
            if own.error is not None:
                request.fail(ModelOutputError(nan_message(request.id, len(request.tokens))))
            accepted.append(range(len(path)))
            next_tokens.append(token)
        return Verdict(accepted, next_tokens)


class EarlyDrafting:
    """Begins steps like that where it is possible.

    Args:
        pending: where draft tokens are on the device.
        accepted: where verification leaves its result.
        chain: the speculators.
        verification: decides.
        states: the target states that speculators declared.
        scheduler: grows rows' KV blocks.
        max_model_len: the longest sequence.
    """

    def __init__(
        self,
        pending: PendingTokens,
        accepted: PendingTokens,
        chain: SpeculatorChain,
        verification: Verification,
        states: TargetStateStore,
        scheduler: Scheduler,
        max_model_len: int,
    ) -> None:
        self._pending = pending
        self._accepted = accepted
        self._chain = chain
        self._verification = verification
        self._states = states
        self._scheduler = scheduler
        self._max_model_len = max_model_len

    def begin(self, target: TargetStep) -> EarlyStep | None:
        """Has a step verified on the device and its drafts made; None if it is to be verified as usual."""
        planned = self._plan(target)
        if planned is None:
            return None
        link, lengths = planned
        requests, offsets = target.requests, target.offsets
        try:
            found = self._verification.match(requests, offsets, target.logits[: offsets[-1]], self._pending)
        except Exception as error:  # too little memory, say: verification in turn finds out whose it is
            logger.debug("a step is verified in turn: %s", error)
            return None
        rows = self._accepted.put(found, [1 + end - begin for begin, end in itertools.pairwise(offsets)])
        self._accepted.fetch()
        upcoming = [UpcomingTokens(row) for row in rows]
        self._record_all(target)
        asked = [(r, n, own) for r, n, own in zip(requests, lengths, upcoming, strict=True) if n is not None]
        early = self._chain.propose_early(
            link, [request for request, _, _ in asked], [n for _, n, _ in asked], [own for _, _, own in asked]
        )
        return EarlyStep(requests, upcoming, early)

    def _plan(self, target: TargetStep) -> tuple[ChainLink, list[Length]] | None:
        """Whom to ask, and what each row may draft."""
        requests = target.requests
        widest = 2 + max((len(request.draft) for request in requests if request.draft is not None), default=0)
        if (
            len(requests) != len(target.rows)
            or target.scored
            or any(request.slot < 0 for request in requests)
            or len(requests) * widest > len(self._accepted)
            or not self._verification.matches(requests)
        ):
            return None
        for request in requests:
            if request.stored_by:
                self._chain.resume(request)
        if not all(self._has_room(request) for request in requests):
            return None
        return self._chain.plan_early(requests)

    def _has_room(self, request: Request) -> bool:
        """Whether a row may draft after all tokens that may come."""
        most = (
            len(request.tokens) + 1 + (0 if request.draft is None else len(request.draft)) + self._scheduler.lookahead
        )
        return most < self._max_model_len and self._scheduler.reserve(request, most)

    def _record_all(self, target: TargetStep) -> None:
        """Gives the store the states of all tokens, as if every draft were accepted; the commit records those that were."""
        final = {}
        for row, first in zip(target.rows, target.first, strict=True):
            request = row.request
            count = row.num_tokens + (0 if request.draft is None else len(request.draft))
            start = request.num_computed
            final[request.slot] = (range(start, start + count), list(range(first, first + count)))
        self._states.record(target.captured, final, {})
