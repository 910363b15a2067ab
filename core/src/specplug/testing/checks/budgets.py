"""No row drafts more than its budget; a budget of zero drafts nothing."""

from __future__ import annotations

from collections.abc import Callable

from specplug.contract.types import Proposal, ProposalBatch
from specplug.testing.check import Check, expect, expect_drafts
from specplug.testing.drafts import row_drafts
from specplug.testing.drive import RandomAcceptance, RestlessPolicy, mixed_params
from specplug.testing.subject import Subject
from specplug.testing.targets import repetitive_prompt


def run(subject: Subject) -> str:
    """Budgets of all sizes: varied, capped by requests, cut by max_tokens and by the end of the context."""
    folder = subject.targets.get()
    most = {"nodes": 0, "depth": 0, "rows": 0, "zero": 0}
    over: list[str] = []

    def propose(batch: ProposalBatch, call: Callable[[], Proposal | None]) -> Proposal | None:
        budgets = [row.budget for row in batch.rows]
        proposal = call()
        try:
            drafts = row_drafts(proposal, len(batch.rows), session.vocabulary)
        except Exception:  # malformed: another check's
            return proposal
        for budget, draft in zip(budgets, drafts, strict=True):
            most["rows"] += 1
            most["zero"] += not budget.max_nodes
            most["nodes"] = max(most["nodes"], len(draft.tokens))
            most["depth"] = max(most["depth"], draft.depth)
            if len(draft.tokens) > budget.max_nodes or draft.depth > budget.max_depth:
                over.append(
                    f"{len(draft.tokens)} nodes, {draft.depth} deep, for max_nodes={budget.max_nodes}, "
                    f"max_depth={budget.max_depth}"
                )
        return proposal

    for seed in range(subject.scaled(3, 2)):
        with subject.start(
            folder, max_num_seqs=4, max_num_batched_tokens=200, block_size=4, max_model_len=90
        ) as session:
            limit = session.speculator.config.num_speculative_tokens
            session.around_propose(propose)
            session.take_over_verification(RandomAcceptance(seed, session.vocabulary))
            session.engine.chain.policy = RestlessPolicy(seed, limit)
            for number in range(8):
                prompt = repetitive_prompt((20, 60, 5)[number % 3], session.vocabulary, seed + number)
                cap = (None, 1, limit, 2)[number % 4]
                session.add(prompt, mixed_params(number, 28, num_speculative_tokens=cap))
            session.finish()
    expect(
        not over,
        "at most row.budget.max_nodes nodes, none deeper than row.budget.max_depth, and none at all for a budget of zero",
        f"{len(over)} of {most['rows']} rows went over; the first: {over[0] if over else ''}",
    )
    expect_drafts(most["nodes"])
    largest = f"at most {most['nodes']} nodes, {most['depth']} deep"
    return f"{most['rows']} rows, {most['zero']} of them with a budget of zero; {largest}"


CHECK = Check(
    "budgets",
    "no draft is larger or deeper than its budget",
    "A draft over its budget is refused, with all drafts of that call: they would not fit the target's next step.",
    "`row.budget` changes from step to step: near the end of a request, in large batches, and it is zero while a "
    "prompt is computed.",
    run,
)
