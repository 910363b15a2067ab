"""Drafts, and whether they are those of a fresh speculator for the same tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import attrs
import torch

from specplug.contract.types import Budget, DraftDistributions, Proposal, ProposalBatch
from specplug.contract.verification import Verdict
from specplug.request import Request
from specplug.sampling.params import SamplingParams
from specplug.speculation.draft import depths_of
from specplug.testing.subject import Subject

TokenPath = tuple[int, ...]


@attrs.define(eq=False, slots=False)
class RowDraft:
    """One row's draft.

    Attributes:
        tokens: ids of the nodes.
        parents: each node's parent, -1 for the root.
        values: [nodes, vocabulary], what each node is said to be drawn from; None for a deterministic draft.
    """

    tokens: list[int]
    parents: list[int]
    values: torch.Tensor | None = None

    @cached_property
    def paths(self) -> list[TokenPath]:
        """Every node as the tokens that lead to it."""
        paths: list[TokenPath] = []
        for token, parent in zip(self.tokens, self.parents, strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        return paths

    @property
    def depth(self) -> int:
        """The deepest node's."""
        return max(depths_of(self.parents), default=0)

    @property
    def branches(self) -> bool:
        """Whether two nodes have the same parent."""
        return len(set(self.parents)) < len(self.parents)

    def distributions(self) -> dict[TokenPath, torch.Tensor]:
        """The reported distributions, by the tokens that precede the draw."""
        if self.values is None:
            return {}
        return {path[:-1]: self.values[node] for node, path in enumerate(self.paths)}


@attrs.frozen(eq=False)
class DraftRecord:
    """A draft, and the row it was made for.

    Attributes:
        number: the request's running number.
        tokens: the committed tokens then.
        begin: the first position that the speculator was shown without a gap up to here.
        forked: whether the row began as a fork.
        budget: what might be drafted.
        params: the request's sampling parameters.
        draft: what was drafted.
    """

    number: int
    tokens: list[int]
    begin: int
    forked: bool
    budget: Budget
    params: SamplingParams
    draft: RowDraft


def row_drafts(proposal: Proposal | None, count: int, vocabulary: int) -> list[RowDraft]:
    """A proposal row by row, as it was returned: nothing is checked."""
    if proposal is None:
        return [RowDraft([], []) for _ in range(count)]
    drafts = []
    for row in range(count):
        tokens = _tokens(proposal, row)
        parents = None if proposal.parents is None else proposal.parents[row]
        probs = None if proposal.probs is None else proposal.probs[row]
        listed = list(range(-1, len(tokens) - 1)) if parents is None else [int(parent) for parent in parents]
        drafts.append(RowDraft(tokens, listed, None if probs is None else _spread(probs, len(tokens), vocabulary)))
    return drafts


def _tokens(proposal: Proposal, row: int) -> list[int]:
    tokens = proposal.tokens[row]
    listed = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
    return listed if proposal.lengths is None else listed[: proposal.lengths[row]]


def _spread(probs: DraftDistributions, nodes: int, vocabulary: int) -> torch.Tensor:
    index = list(range(nodes)) if probs.index is None else [int(i) for i in probs.index]
    values = probs.values.detach().float().cpu()[index].clone()
    if probs.token_ids is None:
        return values
    full = torch.zeros(len(values), vocabulary, dtype=torch.float32, device="cpu")
    return full.index_add_(1, probs.token_ids.cpu(), values)


_MOST_STEPS = 30
TOLERANCE = 2e-3
"""Reported probabilities may differ by so much: rounding differs between one long forward and many short ones."""


@attrs.define(eq=False)
class Comparison:
    """Drafts compared with those of a fresh speculator.

    Attributes:
        compared: how many drafts.
        random: those of them that a second fresh speculator drafts otherwise, and that report no probabilities.
        wrong: (what was drafted, what a fresh speculator drafts, how they differ).
    """

    compared: int = 0
    random: int = 0
    wrong: list[tuple[DraftRecord, RowDraft, str]] = attrs.field(factory=list)

    def first_difference(self) -> str:
        """The first that is wrong, in words."""
        record, fresh, text = self.wrong[0]
        where = f"{len(self.wrong)} of {self.compared} drafts differ; the first after {len(record.tokens)} tokens"
        shown = f" ({record.draft.paths[:6]} instead of {fresh.paths[:6]})" if record.draft.paths != fresh.paths else ""
        return f"{where}: {text}{shown}"


def choose(records: Sequence[DraftRecord], count: int, seed: int) -> list[DraftRecord]:
    """A sample of the records that the speculator saw from their first token; early and late ones are equally likely."""
    usable = [record for record in records if record.begin == 0 and len(record.tokens) >= 2]
    return usable if len(usable) <= count else random.Random(seed).sample(usable, count)


def compare(subject: Subject, folder: Path, records: Sequence[DraftRecord]) -> Comparison:
    """Compares drafts with those of two fresh speculators, which differ in all randomness."""
    first = fresh_drafts(subject, folder, records, seed=11)
    second = fresh_drafts(subject, folder, records, seed=12)
    result = Comparison()
    for record, one, other in zip(records, first, second, strict=True):
        if one is None or other is None:
            continue
        result.compared += 1
        if difference(one, other):
            result.random += 1
        elif text := difference(record.draft, one):
            result.wrong.append((record, one, text))
    return result


def difference(one: RowDraft, other: RowDraft) -> str:
    """In how far two drafts for the same tokens cannot come from the same distribution; empty if they can."""
    if (one.values is None) != (other.values is None) and one.tokens and other.tokens:
        return "only one of them reports probabilities"
    if one.values is None or other.values is None:
        return "" if set(one.paths) == set(other.paths) else "other tokens"
    mine, theirs = one.distributions(), other.distributions()
    for prefix in mine.keys() & theirs.keys():
        gap = float((mine[prefix] - theirs[prefix]).abs().max())
        if gap > TOLERANCE:
            return f"probabilities after {list(prefix)} differ by {gap:.3g}"
    return ""


def fresh_drafts(subject: Subject, folder: Path, records: Sequence[DraftRecord], seed: int) -> list[RowDraft | None]:
    """The first draft of a new engine for the tokens of each record; None where it did not come to drafting."""
    drafts: dict[int, RowDraft] = {}
    wanted: dict[int, DraftRecord] = {}
    rows = max(len(records), 1)  # no slot is used twice: the state of one row must not reach another
    with subject.start(folder, max_num_seqs=rows, max_num_batched_tokens=8192, seed=seed) as session:
        torch.manual_seed(seed)
        random.seed(seed)

        def verify(requests: Sequence[Request], offsets: Sequence[int], logits: torch.Tensor) -> Verdict:
            following = [wanted[r.number].tokens[-1] if r.number in wanted else 0 for r in requests]
            return Verdict([[] for _ in requests], following)

        def propose(batch: ProposalBatch, call: Callable[[], Proposal | None]) -> None:
            numbers = [session.request_of(row).number for row in batch.rows]
            for row, number in zip(batch.rows, numbers, strict=True):
                if row.budget.max_nodes and number in wanted:
                    row.budget = wanted[number].budget
            proposal = call()
            for row, number, draft in zip(
                batch.rows, numbers, row_drafts(proposal, len(batch.rows), session.vocabulary), strict=True
            ):
                if row.budget.max_nodes and list(row.tokens) == wanted[number].tokens:
                    drafts.setdefault(number, draft)

        session.take_over_verification(verify)
        session.around_propose(propose)
        order = []
        for record in records:
            params = attrs.evolve(record.params, n=1, max_tokens=40)
            (request,) = session.add(record.tokens[:-1], params)
            wanted[request.number] = record
            order.append(request)

        def stop(step: int) -> None:
            if len(drafts) == len(order) or step > _MOST_STEPS:
                for request in order:
                    session.engine.abort(request.id)

        session.finish(stop)
    return [drafts.get(request.number) for request in order]


def allowed_differences(compared: int) -> int:
    """Where a model drafts, two tokens may be equally likely up to rounding: one draft in fifty may differ."""
    return compared // 50
