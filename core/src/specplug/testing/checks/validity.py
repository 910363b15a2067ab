"""Nothing raises, and every proposal is well formed, whatever rows go through."""

from __future__ import annotations

from collections.abc import Callable

from specplug.contract.types import Budget, Proposal, ProposalBatch
from specplug.speculation.validation import check_proposal
from specplug.testing.check import Check, CheckFailure, expect_drafts
from specplug.testing.drive import RandomAcceptance, RestlessPolicy, mixed_params
from specplug.testing.session import Session
from specplug.testing.subject import Subject
from specplug.testing.targets import repetitive_prompt

_UNLIMITED = Budget(1 << 30, 1 << 30)


def run(subject: Subject) -> str:
    """A long run; budgets are another check's."""
    calls = rows = nodes = 0
    folder = subject.targets.get()
    for seed, shares in enumerate(("random", "own")):
        problems: list[str] = []

        def propose(batch: ProposalBatch, call: Callable[[], Proposal | None], problems: list[str] = problems) -> None:
            nonlocal calls, rows, nodes
            calls += 1
            try:
                proposal = call()
                drafts = check_proposal(proposal, [_UNLIMITED] * len(batch.rows), "it", session.vocabulary)
            except Exception as error:
                problems.append(f"call {calls}, {len(batch.rows)} rows: {type(error).__name__}: {error}")
                raise
            rows += len(batch.rows)
            nodes += sum(len(draft) for draft in drafts if draft is not None)
            return proposal  # type: ignore[return-value]

        with subject.start(
            folder, max_num_seqs=6, max_num_batched_tokens=96, block_size=4, max_model_len=200
        ) as session:
            session.around_propose(propose)
            if shares == "random":
                session.take_over_verification(RandomAcceptance(seed, session.vocabulary))
                session.engine.chain.policy = RestlessPolicy(seed, session.speculator.config.num_speculative_tokens)
            _load(session, subject.scaled(30, 10), seed)
            session.finish()
        if problems:
            raise CheckFailure(
                "that propose never raises and returns one well-formed draft per row: integer ids of the target's vocabulary, "
                "parents before children, finite scores, probs that are distributions and allow their token",
                f"{len(problems)} faults; {problems[0]}",
            )
    expect_drafts(nodes)
    return f"{calls} calls, {rows} rows, {nodes} draft tokens"


def _load(session: Session, count: int, seed: int) -> None:
    for number in range(count):
        length = (1, 40, 7, 130, 2, 18)[number % 6]
        prompt = repetitive_prompt(length, session.vocabulary, 31 * seed + number)
        limit = min((1, 30, 70, 5, 2)[number % 5], 200 - length)
        session.add(prompt, mixed_params(number, limit, n=(1, 1, 2)[number % 3], seed=(None, None, 5)[number % 3]))


CHECK = Check(
    "validity",
    "propose never raises, and every draft is well formed",
    "A fault costs only drafts, but costs all of them: after three in a row the speculator is switched off.",
    "Ids below the vocabulary, at most the budget, parents before children, one entry per row of the batch, "
    "probabilities that sum to one.",
    run,
)
