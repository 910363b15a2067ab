"""Reported draft probabilities are those that drafts were drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from specplug.contract.types import Proposal, ProposalBatch, Verdict
from specplug.request import Request
from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check, CheckFailure, NotApplicable
from specplug.testing.drafts import RowDraft, row_drafts
from specplug.testing.statistics import THRESHOLD, chi_square_p, uniform_p
from specplug.testing.subject import Subject

V = 16
PROMPT = [3, 7, 5, 11, 3, 7]
_BATCH = 250
_LOOK_AT_FIRST = 2


def collect(subject: Subject, rows: int) -> list[RowDraft]:
    """What is drafted for many rows at one prefix, each with its own random stream."""
    folder = subject.targets.get(vocab_size=V, initializer_range=0.25)
    params = SamplingParams(temperature=0.8, max_tokens=24, ignore_eos=True)
    drafts: list[RowDraft] = []

    def verify(requests: Sequence[Request], offsets: Sequence[int], logits: torch.Tensor) -> Verdict:
        return Verdict([[] for _ in requests], [PROMPT[2]] * len(requests))

    def propose(batch: ProposalBatch, call: Callable[[], Proposal | None]) -> None:
        drafting = [row.budget.max_nodes > 0 for row in batch.rows]
        found = row_drafts(call(), len(batch.rows), session.vocabulary)
        drafts.extend(draft for draft, wanted in zip(found, drafting, strict=True) if wanted)

    with subject.start(folder, max_num_seqs=_BATCH, max_num_batched_tokens=4000, max_model_len=48, seed=3) as session:
        session.take_over_verification(verify)
        session.around_propose(propose)
        for batch in range(-(-rows // _BATCH)):
            for _ in range(_BATCH):
                session.add(PROMPT, params)
            session.engine.step()
            for request in list(session.engine.scheduler.requests()):
                session.engine.abort(request.id)
            if batch + 1 == _LOOK_AT_FIRST and all(draft.values is None for draft in drafts):
                break
        session.finish()
    return drafts


def run(subject: Subject) -> str:
    """Chi-square of what was drawn at each depth, and of each draw's place in its own distribution."""
    drafts = [draft for draft in collect(subject, subject.scaled(10_000, 2_000)) if draft.values is not None]
    if not drafts:
        raise NotApplicable("it reports no probabilities: its drafts are deterministic")
    generator = torch.Generator().manual_seed(0)
    counts: dict[int, torch.Tensor] = {}
    expected: dict[int, torch.Tensor] = {}
    places: list[float] = []
    nodes = 0
    for draft in drafts:
        assert draft.values is not None
        left: dict[int, torch.Tensor] = {}
        for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            depth = len(draft.paths[node])
            probs = left.get(parent)
            if probs is None:
                probs = draft.values[node].double()
            probs = probs / probs.sum()
            if depth not in counts:
                counts[depth], expected[depth] = torch.zeros_like(probs), torch.zeros_like(probs)
            counts[depth][token] += 1
            expected[depth] += probs
            chance = float(probs[token])
            below = float(probs[probs > chance].sum()) + float(probs[:token][probs[:token] == chance].sum())
            places.append(below + chance * float(torch.rand((), generator=generator)))
            left[parent] = probs.clone()
            left[parent][token] = 0  # siblings are drawn without replacement
            nodes += 1
    values = {f"the tokens at depth {depth}": chi_square_p(counts[depth], expected[depth]) for depth in sorted(counts)}
    values["the draws' places in their distributions"] = uniform_p(torch.tensor(places))
    for what, value in values.items():
        if value < THRESHOLD:
            depth = min(counts)
            often = int((counts[depth] - expected[depth]).abs().argmax())
            raise CheckFailure(
                f"that drafts are drawn from what DraftDistributions.values says, temperature and truncation included "
                f"({nodes:,} draws, a p-value of at least {THRESHOLD:g}); a draft of the most likely token reports no probs",
                f"p = {value:.2g} for {what}; at the first depth token {often} came {int(counts[depth][often])} times "
                f"where {float(expected[depth][often]):.0f} were reported",
            )
    return f"{nodes:,} draws for {len(drafts):,} rows, smallest p-value {min(values.values()):.2g}"


CHECK = Check(
    "distributions",
    "reported draft probabilities are those that drafts are drawn from",
    "Rejection sampling is lossless only for the probabilities that were really used.",
    "An argmax draft reports none. A draft restricted to some tokens reports the restricted, renormalised "
    "distribution.",
    run,
)
