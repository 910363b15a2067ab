"""The chain of speculators of one engine: each is asked for the rows that those before it left empty.

What keeps a broken plugin harmless is here too: a fault costs the drafts of that call, is counted and logged once, and
sends the rows that may be half-updated away from the speculator for good; three faults in a row switch it off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from specplug.contract.resources import Resources
from specplug.contract.types import Budget, EndReason
from specplug.errors import PluginError, SpecplugError
from specplug.model.pending import PendingRow, PendingTokens, UpcomingTokens
from specplug.plugins.registry import RegisteredSpeculator
from specplug.speculation.deadline import NotReturnedError
from specplug.speculation.draft import trim_drafts
from specplug.speculation.draft_length import (
    NO_BUDGET,
    DraftLengthPolicy,
    Length,
    ProposeCall,
    catch_up_tokens,
    plan_budgets,
)
from specplug.speculation.early import EarlyProposal, check_early
from specplug.speculation.link import ChainLink
from specplug.speculation.row import Row
from specplug.speculation.target_states.store import TargetStateStore
from specplug.speculation.validation import check_proposal

logger = logging.getLogger("specplug")
_FAULTS_TO_STOP = 3
_SLOW_SECONDS = 0.5


class SpeculatorChain:
    """Drives the speculators of one engine."""

    def __init__(
        self,
        speculators: Sequence[RegisteredSpeculator],
        states: TargetStateStore,
        policy: DraftLengthPolicy,
        *,
        vocab_size: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        max_num_draft_tokens: int | None,
        strict: bool,
        pending: PendingTokens | None = None,
    ) -> None:
        self._pending = pending
        self._left: list[tuple[ChainLink, list[Row], list[PendingRow]]] = []  # on the device, and not checked yet
        self._uses_scores = max_num_draft_tokens is not None or pending is None
        self._links = [ChainLink(speculator) for speculator in speculators]
        self._states = states
        self.policy = policy
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_draft_tokens = max_num_draft_tokens
        self._strict = strict
        self._turn = 0  # which row comes first where not all get a draft
        self._target_seconds = 0.0  # of the latest step, without proposing
        self._proposers: dict[int, ChainLink] = {}  # request number → who proposed what is being verified
        self._kept_at_rest: list[int] = []  # slots whose states are kept in steps without budgets

    @property
    def speculators(self) -> list[RegisteredSpeculator]:
        """The speculators, in the order they are asked."""
        return [link.speculator for link in self._links]

    @property
    def faults(self) -> dict[str, int]:
        """Faults by method."""
        return {link.speculator.method: link.faults for link in self._links}

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent in `propose` by method."""
        return {link.speculator.method: link.seconds for link in self._links}

    @property
    def enabled(self) -> dict[str, bool]:
        """Whether each method is still asked."""
        return {link.speculator.method: link.enabled for link in self._links}

    def warmup(self, resources: Sequence[Resources]) -> None:
        """Runs every speculator's `warmup` with its own resources."""
        for link, own in zip(self._links, resources, strict=True):
            try:
                link.speculator.warmup(resources=own)
            except SpecplugError:
                raise
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise PluginError(f"speculator '{link.speculator.method}' failed in warmup: {what}") from error

    def fork(self, parent: Row, child: Row) -> None:
        """Notes how much of a fork's shared part each speculator has been given; what it stored for that, the fork has too."""
        for link in self._links:
            link.fork(parent, child)
        self.policy.fork(parent, child)

    def resume(self, request: Row) -> None:
        """Takes in how much of a row each speculator has in the prefix cache."""
        stored_by, request.stored_by = request.stored_by, {}
        for index, count in stored_by.items():
            self._links[index].resume(request, count)

    def num_stored(self, index: int, request: Row) -> int:
        """How many of a row's first positions a speculator was given without a gap."""
        return self._links[index].stored.get(request.number, 0)

    def end(self, request: Row, slot: int, reason: EndReason) -> None:
        """Notes that a row left its slot; every speculator that knew it is told at its next call."""
        for link in self._links:
            link.end(request, slot, reason)
        self._proposers.pop(request.number, None)
        if reason == "preempted":
            self.policy.restart(request)
        else:
            self.policy.finish(request)
        self._states.drop(slot)

    def rests(self, requests: Sequence[Row]) -> bool:
        """Whether nobody will be asked after this step, whatever its tokens are."""
        return not self._links or self.policy.rests(requests)

    def rest(self) -> None:
        """Ends a step in which nobody is asked."""
        self._states.keep(self._kept_at_rest)
        self._states.end_step()

    def plan_early(self, requests: Sequence[Row]) -> tuple[ChainLink, list[Length]] | None:
        """Whom to ask before the host knows what a step brings, and what each row may draft; None if that is not possible."""
        if len(self._links) != 1 or self._uses_scores:
            return None
        (link,) = self._links
        if (
            not link.enabled
            or not link.speculator.traits.drafts_early
            or any(r.number in link.banned for r in requests)
        ):
            return None
        if self._nodes_of_a_row(len(requests)) == 0:
            return None
        if not self.policy.plans_early(requests) or not self.policy.begin(requests):
            return None
        return link, self.policy.plan(link.speculator, requests, self._seen_by(link), self._has_all_states)

    def propose_early(
        self, link: ChainLink, requests: list[Row], lengths: Sequence[int | Budget], upcoming: Sequence[UpcomingTokens]
    ) -> EarlyProposal:
        """Asks a speculator for drafts after tokens that are on the device alone; `propose` takes them in.

        Args:
            link: the speculator.
            requests: the rows, as they are before this step.
            lengths: what each may draft.
            upcoming: each row's tokens.
        """
        early = EarlyProposal(link, requests, list(lengths))
        if not requests:
            return early
        most = self._nodes_of_a_row(len(requests))
        budgets = plan_budgets(requests, lengths, link.speculator.traits, self._max_model_len, most)
        stops = [len(request.tokens) - 1 + len(own) for request, own in zip(requests, upcoming, strict=True)]
        started = time.perf_counter()
        try:
            early.batch = link.make_batch(
                requests, budgets, self._states, self.policy, uses_scores=False, upcoming=upcoming, stops=stops
            )
            early.proposal = check_early(link.speculator.propose(batch=early.batch), budgets)
        except Exception as error:
            self._fault(link, requests, error)
        finally:
            elapsed = time.perf_counter() - started
            link.seconds += elapsed
        if elapsed > _SLOW_SECONDS and not link.is_told_slow:
            self._warn_of_slowness(link, elapsed, budgets)
        return early

    def propose(
        self, requests: Sequence[Row], reserve: Callable[..., bool], contended: bool, early: EarlyProposal | None = None
    ) -> None:
        """Fills `request.draft` of the rows that get one.

        Args:
            requests: the rows that advanced in this step; those with more than one pending token are still prefilling.
            reserve: grows a row's blocks.
            contended: whether other requests wait for a share of the next step's tokens.
            early: what was proposed for this step already.
        """
        self._check_left()
        if early is not None:
            early.link.settle(requests)
        elif not self.policy.begin(requests):
            self.rest()
            return
        decoding = max(1, sum(request.num_pending == 1 for request in requests))
        node_limit = self._nodes_of_a_row(decoding, contended=contended)
        if (
            early is None
        ):  # an early call came before it: told at the next call, it would pass for the result of that draft
            for request in requests:
                if request.outcome is not None and request.number in self._proposers:
                    self._proposers[request.number].outcomes[request.number] = request.outcome
        self._proposers = {}
        for link in self._links:
            if not link.enabled:
                continue
            started = time.perf_counter()
            asked = self._lengths(link, requests) if early is None else early.left(requests)
            call = self._ask(link, *asked, node_limit, reserve, early)
            self.policy.proposed(link.speculator, time.perf_counter() - started, call)  # the device hides an early call
        self._keep_unseen_states(requests)
        total = node_limit * decoding
        if self._max_num_draft_tokens is not None:
            total = min(total, self._max_num_draft_tokens)
        drafts = trim_drafts(self.policy.trim([request.draft for request in requests]), total, self._turn)
        self._turn += 1
        for request, draft in zip(requests, drafts, strict=True):
            request.draft = draft if draft is not None and len(draft) else None
        self.policy.end(requests)

    def _nodes_of_a_row(self, rows: int, *, contended: bool = False) -> int:
        """The most draft nodes of each row, so that all rows fit the next step, or half of it."""
        tokens = self._max_num_batched_tokens // (2 if contended else 1)
        return max(0, tokens // rows - 1)  # rows may outnumber the tokens of half a step

    def _check_left(self) -> None:
        """Ids that stayed on the device have been read by now: were they ids of the target?"""
        left, self._left = self._left, []
        for link, requests, rows in left:
            for row in rows:
                row.read()
            error = next((row.error for row in rows if row.error is not None), None)
            if error is None:
                link.faults_in_a_row = 0
            else:
                self._fault(link, requests, PluginError(error))

    def observe(self, requests: Sequence[Row], seconds: float, *, decoding: bool) -> None:
        """Tells the policy what a step took and brought; see `DraftLengthPolicy.observe`."""
        self._target_seconds = seconds
        self.policy.observe(requests, seconds, decoding=decoding)

    def _lengths(self, link: ChainLink, requests: Sequence[Row]) -> tuple[list[Row], list[int | Budget]]:
        """The rows that a speculator is shown, and what each may draft."""
        requests = [r for r in requests if r.draft is None and r.number not in link.banned]
        lengths = self.policy.plan(link.speculator, requests, self._seen_by(link), self._has_all_states)
        chosen = [(request, length) for request, length in zip(requests, lengths, strict=True) if length is not None]
        return [request for request, _ in chosen], [length for _, length in chosen]

    @staticmethod
    def _seen_by(link: ChainLink) -> Mapping[int, int]:
        """Request number → the first position that a speculator was not shown yet."""
        return {**link.delivered, **link.forked} if link.forked else link.delivered

    def _ask(
        self,
        link: ChainLink,
        requests: list[Row],
        lengths: list[int | Budget],
        node_limit: int,
        reserve: Callable[..., bool],
        early: EarlyProposal | None,
    ) -> ProposeCall | None:
        """Asks a speculator for drafts, if it was not asked early.

        Returns:
            What was asked; None where there was nothing to ask or it failed.
        """
        traits = link.speculator.traits
        lengths = [0 if r.num_pending > 1 else length for r, length in zip(requests, lengths, strict=True)]
        budgets = plan_budgets(requests, lengths, traits, self._max_model_len, node_limit)
        if early is None:
            scratch = link.speculator.scratch_tokens_per_row
            for index, (request, budget) in enumerate(zip(requests, budgets, strict=True)):
                wanted = max(scratch, budget.max_nodes)
                if budget.max_nodes and not reserve(request, len(request.tokens) + wanted):
                    budgets[index] = NO_BUDGET
        if traits.token_only:
            chosen = [i for i, budget in enumerate(budgets) if budget.max_nodes]
            requests, budgets = [requests[i] for i in chosen], [budgets[i] for i in chosen]
        if not requests and (early is not None or not link.ended):
            return None
        started = time.perf_counter()
        try:
            if early is not None and early.batch is not None:
                batch, (proposal, planned) = early.batch, early.cut(requests, budgets)
            else:
                uses_scores = self._uses_scores or any(request.is_traced for request in requests)
                batch = link.make_batch(requests, budgets, self._states, self.policy, uses_scores=uses_scores)
                proposal, planned = link.speculator.propose(batch=batch), budgets
            drafts = check_proposal(proposal, planned, link.speculator.method, self._vocab_size, self._pending)
            if early is not None:
                drafts = early.pick(requests, drafts)
        except Exception as error:
            self._fault(link, requests, error)
            return None
        finally:
            elapsed = time.perf_counter() - started
            link.seconds += elapsed
        if elapsed > _SLOW_SECONDS and not link.is_told_slow:
            self._warn_of_slowness(link, elapsed, budgets)
        if left := [draft.pending for draft in drafts if draft is not None and draft.pending is not None]:
            self._left.append((link, requests, left))
        else:
            link.faults_in_a_row = 0
        for request, draft, budget in zip(requests, drafts, budgets, strict=True):
            request.draft = draft
            if draft is not None:
                self._proposers[request.number] = link
                draft.speculator, draft.proposed = link.speculator, len(draft)
                draft.allowed = (
                    budget.max_nodes if draft.parents is not None else min(budget.max_nodes, budget.max_depth)
                )
        depths = {
            r.number: len(draft) if draft is not None and draft.is_scored_chain else budget.max_depth
            for r, draft, budget in zip(requests, drafts, budgets, strict=True)
            if budget.max_nodes
        }
        allowed = max((min(b.max_nodes, b.max_depth) for b in budgets), default=0)
        return ProposeCall(depths, 0 if traits.token_only else catch_up_tokens(batch), allowed)

    def _has_all_states(self, request: Row) -> bool:
        """Whether the target's states of a row are kept from its first token on."""
        return self._states.available_from(request.slot, 0) == 0

    def _keep_unseen_states(self, requests: Sequence[Row]) -> None:
        """Rows that some speculator has not seen up to date keep their states for a while."""
        if not self._states.specs:
            return
        stateful = [link for link in self._links if link.enabled and link.speculator.traits.needs_states]
        unseen = []
        self._kept_at_rest = []
        for request in requests:
            wanted_by = [link for link in stateful if self.policy.keeps_states(link.speculator, request)]
            if wanted_by:
                self._kept_at_rest.append(request.slot)
            if all(link.delivered.get(request.number) == request.num_computed for link in wanted_by):
                self._states.drop(request.slot)
            else:
                unseen.append(request.slot)
        self._states.keep(unseen)
        self._states.end_step()

    def _warn_of_slowness(self, link: ChainLink, elapsed: float, budgets: Sequence[Budget]) -> None:
        """Warns, once, of a call that took longer than plain decoding of all that it may draft."""
        most = 1 + max((min(budget.max_nodes, budget.max_depth) for budget in budgets), default=0)
        if elapsed > most * self._target_seconds:
            link.is_told_slow = True
            logger.warning(
                "speculator '%s' took %.3g s for one proposal, the target's step before it %.3g s; drafts that take so long "
                "cost more than they can save (said once)",
                link.speculator.method,
                elapsed,
                self._target_seconds,
            )

    def _fault(self, link: ChainLink, requests: Sequence[Row], error: Exception) -> None:
        method = link.speculator.method
        if self._strict:
            raise PluginError(f"speculator '{method}': {type(error).__name__}: {error}") from error
        for request in requests:
            link.stored.pop(request.number, None)
        link.faults += 1
        link.faults_in_a_row += 1
        if link.faults == 1:
            logger.warning(
                "speculator '%s' failed and its drafts of this step are lost (output is not affected): %s: %s",
                method,
                type(error).__name__,
                error,
                exc_info=not isinstance(error, PluginError),
            )
        if not link.speculator.traits.token_only:
            link.banned.update(request.number for request in requests)
        hangs = isinstance(error, NotReturnedError)
        if hangs or link.faults_in_a_row >= _FAULTS_TO_STOP:
            link.enabled = False
            self.policy.retire(link.speculator)
            why = "did not return" if hangs else f"failed {link.faults_in_a_row} times in a row"
            logger.warning("speculator '%s' %s and is switched off", method, why)
