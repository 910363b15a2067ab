"""How much each row may draft in a step, and which rows sleep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specplug.contract.batch import Budget
from specplug.contract.traits import SpeculatorTraits
from specplug.plugins.registry import RegisteredSpeculator
from specplug.request import Request

NO_BUDGET = Budget(0, 0)


class BudgetPolicy(Protocol):
    """Chooses, before `propose`, what each row may draft."""

    def wish(self, request: Request, speculator: RegisteredSpeculator) -> int | None:
        """The most draft tokens of a speculator for a row; 0 keeps its speculator up to date; None lets it sleep."""
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
    wishes: Sequence[int],
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
        depth = max(0, min(traits.max_depth or wish, still, room)) if wish else 0
        nodes = max(0, min(traits.max_nodes or depth, node_limit)) if depth else 0
        if request.params.num_speculative_tokens is not None:
            nodes = min(nodes, request.params.num_speculative_tokens)
        budgets.append(Budget(nodes, min(depth, nodes)) if nodes else NO_BUDGET)
    return budgets
