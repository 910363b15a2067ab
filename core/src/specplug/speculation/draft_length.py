"""How much each row may draft in a step: the interface of the policy, and fixed lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs

from specplug.contract.types import Budget, ProposalBatch, SpeculatorTraits
from specplug.plugins.registry import RegisteredSpeculator
from specplug.speculation.draft import Draft
from specplug.speculation.row import Row

NO_BUDGET = Budget(0, 0)
SHORT_GAP = 16
"""Tokens that a row may be behind without its catch-up being told apart from drafting."""
Length = int | Budget | None
"""What a speculator may draft for a row: at most so many tokens, or the whole tree of one that drafts trees; 0 only brings it
up to date; a `Budget` says how many nodes and how deep; with None the row sleeps, and the speculator is not shown it."""


@attrs.frozen
class ProposeCall:
    """One call of `propose` that went well; its drafts are in `request.draft`.

    Attributes:
        depths: request number → the depth that was allowed, or reached by a speculator that may stop earlier. Rows that were
            not to draft are left out.
        catch_up: tokens that it processed apart from those of the last step: prompts, and what rows missed while they slept.
        allowed: the greatest depth that any row was allowed.
    """

    depths: Mapping[int, int]
    catch_up: int = 0
    allowed: int = 0

    @property
    def deepest(self) -> int:
        """The greatest depth of all rows; 0 where none was to draft."""
        return max(self.depths.values(), default=0)


class DraftLengthPolicy:
    """Chooses draft lengths for one engine. In each step the chain calls, in this order:

    `observe` (what the step took and brought), `restart` and `finish` (rows that left), `fork`, `begin`; for each speculator
    `plan` and `proposed`; then `trim` and `end`. Where `plans_early` allows it, `begin` and `plan` come before `observe`. Only
    `plan` must be implemented. State that a policy keeps of a request is
    its own, by `request.number`, until `finish`.
    """

    def begin(self, requests: Sequence[Row]) -> bool:
        """Begins a step; returns False if no speculator is to be asked in it: then neither `plan` nor `end` is called."""
        return True

    def rests(self, requests: Sequence[Row]) -> bool:
        """Whether, before `observe`, it is certain that `begin` will return False, whatever the tokens of the step are."""
        return False

    def plan(
        self,
        speculator: RegisteredSpeculator,
        requests: Sequence[Row],
        seen: Mapping[int, int],
        has_all_states: Callable[[Row], bool],
    ) -> list[Length]:
        """What each row may draft with one speculator.

        Args:
            speculator: who will be asked.
            requests: the rows that it may be asked for.
            seen: request number → the first position that the speculator was not shown yet.
            has_all_states: whether the target's states of a row are stored from its first token on.
        """
        raise NotImplementedError

    def plans_early(self, requests: Sequence[Row]) -> bool:
        """Whether `begin` and `plan` may be called for drafts after this step before `observe` says what it brings."""
        return False

    def proposed(self, speculator: RegisteredSpeculator, seconds: float, call: ProposeCall | None) -> None:
        """Planning and asking took so long; `call` is None where the speculator was not called, or failed."""

    def trim(self, drafts: Sequence[Draft | None]) -> Sequence[Draft | None]:
        """Cuts what is not worth verifying."""
        return drafts

    def end(self, requests: Sequence[Row]) -> None:
        """Ends a step: `request.draft` is what the next one verifies."""

    def observe(self, requests: Sequence[Row], seconds: float, *, decoding: bool) -> None:
        """Learns from a step.

        Args:
            requests: all its rows; `request.outcome` says what became of each draft.
            seconds: from its begin until its tokens were known.
            decoding: whether every row ran one pending token and nothing other than its draft.
        """

    def fork(self, parent: Row, child: Row) -> None:
        """A sequence starts on another one's prompt, and on what speculators stored for that."""

    def restart(self, request: Row) -> None:
        """A row was preempted: what speculators stored for it is gone, and it is computed anew."""

    def finish(self, request: Row) -> None:
        """A row ended."""

    def retire(self, speculator: RegisteredSpeculator) -> None:
        """A speculator is not asked any more."""

    def lose_states(self, speculator: RegisteredSpeculator, request: Row) -> None:
        """Target states of a row were gone before a speculator was shown them."""

    def keeps_states(self, speculator: RegisteredSpeculator, request: Row) -> bool:
        """Whether target states that a speculator was not shown yet are worth storing."""
        return True

    def plain_seconds(self, num_rows: int) -> float | None:
        """The expected seconds of a target step of so many rows without drafts; None where the policy does not know."""
        return None


class FixedDraftLength(DraftLengthPolicy):
    """Every row may draft as much as was configured; rows that opted out sleep."""

    def plan(
        self,
        speculator: RegisteredSpeculator,
        requests: Sequence[Row],
        seen: Mapping[int, int],
        has_all_states: Callable[[Row], bool],
    ) -> list[Length]:
        """See `DraftLengthPolicy.plan`."""
        return [self.length_of(request, speculator) for request in requests]

    def plans_early(self, requests: Sequence[Row]) -> bool:
        """See `DraftLengthPolicy.plans_early`."""
        return True

    def length_of(self, request: Row, speculator: RegisteredSpeculator) -> Length:
        """What one row may draft."""
        limit = speculator.config.num_speculative_tokens
        cap = request.params.num_speculative_tokens
        if cap == 0:
            return None
        return limit if cap is None else min(cap, limit)


def plan_budgets(
    requests: Sequence[Row],
    lengths: Sequence[int | Budget],
    traits: SpeculatorTraits,
    max_model_len: int,
    node_limit: int,
) -> list[Budget]:
    """Turns lengths into budgets that the next step can verify.

    Args:
        requests: the rows.
        lengths: what the policy allows each.
        traits: of the speculator; a tree may hold more nodes than it is deep.
        max_model_len: no node may be at or beyond this position.
        node_limit: the most nodes of one row, so that all rows fit one step.
    """
    budgets = []
    for request, length in zip(requests, lengths, strict=True):
        assert request.params.max_tokens is not None
        still = request.params.max_tokens - request.num_output_tokens - 1
        positions = max_model_len - len(request.tokens) - 1
        probability = surplus = 0.0
        if isinstance(length, Budget):
            most, deepest = length.max_nodes, length.max_depth
            probability, surplus = length.min_probability, length.min_surplus
        else:
            most, deepest = traits.max_nodes or 0, (traits.max_depth or length) if length else 0
        depth = max(0, min(deepest, still, positions))
        nodes = max(0, min(most or depth, node_limit)) if depth else 0
        if request.params.num_speculative_tokens is not None:
            nodes = min(nodes, request.params.num_speculative_tokens)
        depth = min(depth, nodes)
        if isinstance(length, Budget) and (nodes, depth) == (length.max_nodes, length.max_depth):
            budgets.append(length)
        else:
            budgets.append(Budget(nodes, depth, probability, surplus) if nodes else NO_BUDGET)
    return budgets


def catch_up_tokens(batch: ProposalBatch) -> int:
    """Tokens of a call that a speculator with a state processes apart from those of the last step."""
    spare = [0 if row.upcoming is None else len(row.upcoming) - 1 for row in batch.rows]
    sizes = [(len(row.new_positions) - own, row.budget.max_nodes) for row, own in zip(batch.rows, spare, strict=True)]
    return sum(size for size, nodes in sizes if size > SHORT_GAP or not nodes)
