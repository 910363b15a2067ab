"""Drafts: well formed, within their budget, and as the traits and flags promise."""

from __future__ import annotations

from collections.abc import Callable

from specplug.contract.types import Budget, Proposal, ProposalBatch
from specplug.speculation.validation import check_proposal
from specplug.testing.check import Check
from specplug.testing.driver import Drive, RandomAcceptance, RestlessPolicy, drive_rollbacks, mixed_params
from specplug.testing.failures import CheckFailure, NotApplicable, expect, expect_drafts
from specplug.testing.reference import choose, difference, fresh_drafts, row_drafts
from specplug.testing.session import Session
from specplug.testing.subject import Subject
from specplug.testing.targets import repetitive_prompt

_UNLIMITED = Budget(1 << 30, 1 << 30)


def validity(subject: Subject) -> str:
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


VALIDITY = Check(
    "validity",
    "propose never raises, and every draft is well formed",
    "A fault costs only drafts, but costs all of them: after three in a row the speculator is switched off.",
    "Ids below the vocabulary, at most the budget, parents before children, one entry per row of the batch, "
    "probabilities that sum to one.",
    validity,
)


def budgets(subject: Subject) -> str:
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


BUDGETS = Check(
    "budgets",
    "no draft is larger or deeper than its budget",
    "A draft over its budget is refused, with all drafts of that call: they would not fit the target's next step.",
    "`row.budget` changes from step to step: near the end of a request, in large batches, and it is zero while a "
    "prompt is computed.",
    budgets,
)


def promises(subject: Subject) -> str:
    """Compares flags with one drive."""
    folder = subject.targets.get()
    drive: Drive = subject.remember("rollbacks 0", lambda: drive_rollbacks(subject, folder, seed=0))
    with subject.start(folder) as session:
        traits = session.speculator.traits
        caches = any(region.layers for region in session.regions())
    sampled = [record for record in drive.records if not record.params.greedy]
    seen = {
        "drafts": any(record.draft.tokens for record in drive.records),
        "samples": any(record.draft.values is not None for record in sampled),
        "proposes_trees": any(record.draft.branches for record in drive.records),
        "reads_states": traits.needs_states,
        "owns_kv": caches,
    }
    promised = [name for name in seen if getattr(subject.flags, name) is not None]
    for name in promised:
        if getattr(subject.flags, name) != seen[name]:
            raise CheckFailure(f"{name} = {getattr(subject.flags, name)}, as its flags say", f"{name} is {seen[name]}")
    found = ", ".join(name for name, value in seen.items() if value) or "nothing"
    if not promised:
        raise NotApplicable(f"no flag is set; found: {found}")
    return f"found: {found}"


PROMISES = Check(
    "promises",
    "the flags of its test are what it does",
    "A flag that is set keeps the other checks from passing because nothing was drafted, sampled or branched.",
    "Set what is true: a flag that does not hold is as wrong as a speculator that does not do it.",
    promises,
)


def tokens(subject: Subject) -> str:
    """The same tokens in two engines that differ in all randomness."""
    folder = subject.targets.get()
    with subject.start(folder) as session:
        token_only = session.speculator.traits.token_only
    if subject.learns:
        raise NotApplicable("its drafts may depend on other requests, as traits.learns says")
    if not token_only and not subject.flags.deterministic:
        raise NotApplicable("it declares neither traits.token_only nor the flag deterministic")
    drive: Drive = subject.remember("rollbacks 0", lambda: drive_rollbacks(subject, folder, seed=0))
    records = [record for record in drive.records if token_only or record.params.greedy]
    records = choose(records, subject.scaled(80, 30), seed=2)
    first = fresh_drafts(subject, folder, records, seed=21)
    second = fresh_drafts(subject, folder, list(reversed(records)), seed=22)
    pairs = [(a, b) for a, b in zip(first, reversed(second), strict=True) if a is not None and b is not None]
    different = [(a, b) for a, b in pairs if difference(a, b)]
    if different:
        one, other = different[0]
        promise = "traits.token_only promises" if token_only else "the flag deterministic promises"
        raise CheckFailure(
            f"the same drafts for the same tokens, as {promise}: no global random numbers, no clock, no other rows",
            f"{len(different)} of {len(pairs)} differ from engine to engine; the first: {one.paths[:4]} and {other.paths[:4]}",
        )
    expect_drafts(sum(len(one.tokens) for one, _ in pairs))
    return f"{len(pairs)} prefixes, alike in two engines"


TOKENS = Check(
    "tokens",
    "a token-only or deterministic speculator drafts the same for the same tokens",
    "Such a speculator keeps its rows after a fault, may run in hosts without row ids, and can be debugged.",
    "No global random numbers, no clock, no other rows; one that learns from other requests declares `traits.learns`.",
    tokens,
)
