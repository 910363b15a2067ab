"""How much each row may draft in a step, and which rows sleep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specplug.contract.types import Budget, SpeculatorTraits
from specplug.plugins.registry import RegisteredSpeculator
from specplug.request import Request

NO_BUDGET = Budget(0, 0)
Wish = int | Budget | None


class BudgetPolicy(Protocol):
    """Chooses, before `propose`, what each row may draft."""

    def wish(self, request: Request, speculator: RegisteredSpeculator) -> Wish:
        """What a speculator may draft for a row.

        At most so many tokens, or the whole tree of one that drafts trees; 0 keeps the speculator up to date; a `Budget` says
        how many nodes and how deep; None lets the row sleep.
        """
        ...


class FixedBudget:
    """Every row may draft as much as was configured; rows that opted out sleep."""

    def wish(self, request: Request, speculator: RegisteredSpeculator) -> int | None:
        """See `BudgetPolicy.wish`."""
        limit = speculator.config.num_speculative_tokens
        cap = request.params.num_speculative_tokens
        if cap == 0:
            return None
        return limit if cap is None else min(cap, limit)


def plan_budgets(
    requests: Sequence[Request],
    wishes: Sequence[int | Budget],
    traits: SpeculatorTraits,
    max_model_len: int,
    node_limit: int,
) -> list[Budget]:
    """Turns wishes into budgets that the next step can verify.

    Args:
        requests: the rows.
        wishes: what the policy allows each.
        traits: of the speculator; a tree may hold more nodes than it is deep.
        max_model_len: no node may lie at or beyond this position.
        node_limit: the most nodes of one row, so that all rows fit one step.
    """
    budgets = []
    for request, wish in zip(requests, wishes, strict=True):
        assert request.params.max_tokens is not None
        still = request.params.max_tokens - request.num_output_tokens - 1
        room = max_model_len - len(request.tokens) - 1
        least = total = 0.0
        if isinstance(wish, Budget):
            most, deepest = wish.max_nodes, wish.max_depth
            least, total = wish.least_chance, wish.least_sum
        else:
            most, deepest = traits.max_nodes or 0, (traits.max_depth or wish) if wish else 0
        depth = max(0, min(deepest, still, room))
        nodes = max(0, min(most or depth, node_limit)) if depth else 0
        if request.params.num_speculative_tokens is not None:
            nodes = min(nodes, request.params.num_speculative_tokens)
        depth = min(depth, nodes)
        if isinstance(wish, Budget) and (nodes, depth) == (wish.max_nodes, wish.max_depth):
            budgets.append(wish)
        else:
            budgets.append(Budget(nodes, depth, least, total) if nodes else NO_BUDGET)
    return budgets
