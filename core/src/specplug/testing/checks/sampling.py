"""Sampled output has the target's distribution, and drafts the distribution that they report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from specplug.contract.types import Proposal, ProposalBatch
from specplug.contract.verification import Verdict
from specplug.request import Request
from specplug.sampling.distributions import process
from specplug.sampling.params import SamplingParams
from specplug.sampling.randomness import Stream
from specplug.testing.check import Check
from specplug.testing.failures import CheckFailure, NotApplicable, expect, expect_drafts
from specplug.testing.reference import RowDraft, row_drafts
from specplug.testing.statistics import THRESHOLD, chi_square_p, joint_p_values, uniform_p
from specplug.testing.subject import Subject

V = 16
TARGET_PARAMS = SamplingParams(temperature=0.8, top_k=11, max_tokens=5, ignore_eos=True)
_BATCH = 250
_PERIOD = 5
_PATTERNS = 200


def sampling(subject: Subject) -> str:
    """Thousands of unseeded requests with one prompt; chi-square per position and on the joint of three tokens."""
    folder = subject.targets.get(vocab_size=V, initializer_range=0.25)
    ids = tuple(range(V)) if subject.targets.vocabulary(folder) > V else ()
    params = SamplingParams(temperature=0.8, top_k=11, max_tokens=5, ignore_eos=True, allowed_token_ids=ids)
    trials = subject.scaled(12_000, 2_000)
    prompt = continuing_prompt(subject, folder)
    with subject.start(folder, max_num_seqs=_BATCH, max_num_batched_tokens=4000, max_model_len=32, seed=1) as session:
        outputs = session.generate([prompt] * trials, [params] * trials)
        stats = session.engine.stats
    samples = torch.tensor([output[:3] for output in outputs], dtype=torch.int64, device="cpu")
    values = joint_p_values(samples, joint_of_three(subject, folder, prompt))
    for what, value in values.items():
        if value < THRESHOLD:
            raise CheckFailure(
                f"the target's own distribution after temperature and top_k, over {V} tokens and {trials:,} trials "
                f"(a p-value of at least {THRESHOLD:g})",
                f"p = {value:.2g} for {what}; {stats.num_accepted_draft_tokens} of {stats.num_draft_tokens} accepted",
            )
    expect_drafts(stats.num_draft_tokens)
    worst = min(values.values())
    rate = stats.num_accepted_draft_tokens / stats.num_draft_tokens
    return f"{trials:,} trials, smallest p-value {worst:.2g}, {rate:.0%} of {stats.num_draft_tokens:,} draft tokens accepted"


def continuing_prompt(subject: Subject, folder: Path) -> list[int]:
    """A pattern, repeated, that the target itself is likely to go on with: methods that look tokens up draft there."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.stack(
        [torch.randperm(V, generator=generator, dtype=torch.int64, device="cpu")[:_PERIOD] for _ in range(_PATTERNS)]
    )
    known = 3 * _PERIOD
    batch = patterns.repeat(1, 4)
    with torch.no_grad():
        logits = subject.targets.reference(folder)(batch, use_cache=False).logits[:, known - 1 : -1, :V].float()
    likely = process(logits.flatten(0, 1), [TARGET_PARAMS] * logits.shape[0] * logits.shape[1]).view_as(logits)
    probabilities = likely.gather(2, batch[:, known:, None])[..., 0]
    best = int((probabilities[:, 0] * probabilities[:, 1:3].mean(dim=1)).argmax())
    return [int(token) for token in batch[best, :known]]


def joint_of_three(subject: Subject, folder: Path, prompt: list[int]) -> torch.Tensor:
    """Exact float64 [V, V, V] probabilities of the first three tokens, from Transformers' own logits."""
    pairs = torch.cartesian_prod(
        torch.arange(V, dtype=torch.int64, device="cpu"), torch.arange(V, dtype=torch.int64, device="cpu")
    )
    batch = torch.cat([torch.tensor([prompt], dtype=torch.int64, device="cpu").expand(V * V, -1), pairs], dim=1)
    with torch.no_grad():
        logits = subject.targets.reference(folder)(batch, use_cache=False).logits[:, len(prompt) - 1 :, :V]
    first, second, third = (process(logits[:, i].float(), [TARGET_PARAMS] * V * V).double() for i in range(3))
    prefix = first[0][pairs[:, 0]] * second[torch.arange(V * V, dtype=torch.int64, device="cpu"), pairs[:, 1]]
    return (prefix[:, None] * third).view(V, V, V)


SAMPLING = Check(
    "sampling",
    "sampled output is distributed as the target's own",
    "What it reports, draws and leaves out does not bias the output: a small vocabulary shows what wide ones hide.",
    "Sampled drafts must report what they were drawn from, temperature and truncation included; a token must not "
    "be left out because of which one it was.",
    sampling,
)


PROMPT = [3, 7, 5, 11, 3, 7]
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


def distributions(subject: Subject) -> str:
    """Chi-square of what was drawn at each depth, and of each draw's quantile in its own distribution."""
    drafts = [draft for draft in collect(subject, subject.scaled(10_000, 2_000)) if draft.values is not None]
    if not drafts:
        raise NotApplicable("it reports no probabilities: its drafts are deterministic")
    generator = torch.Generator().manual_seed(0)
    counts: dict[int, torch.Tensor] = {}
    expected: dict[int, torch.Tensor] = {}
    quantiles: list[float] = []
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
            probability = float(probs[token])
            below = float(probs[probs > probability].sum()) + float(probs[:token][probs[:token] == probability].sum())
            quantiles.append(
                below + probability * float(torch.rand((), generator=generator, dtype=torch.float32, device="cpu"))
            )
            left[parent] = probs.clone()
            left[parent][token] = 0  # siblings are drawn without replacement
            nodes += 1
    values = {f"the tokens at depth {depth}": chi_square_p(counts[depth], expected[depth]) for depth in sorted(counts)}
    values["the draws' quantiles in their distributions"] = uniform_p(
        torch.tensor(quantiles, dtype=torch.float32, device="cpu")
    )
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


DISTRIBUTIONS = Check(
    "distributions",
    "reported draft probabilities are those that drafts are drawn from",
    "Rejection sampling is lossless only for the probabilities that were really used.",
    "An argmax draft reports none. A draft restricted to some tokens reports the restricted, renormalised "
    "distribution.",
    distributions,
)


VERIFYING = (Stream.TARGET, Stream.ACCEPTANCE, Stream.RESIDUAL)
_ROWS = 24


def streams(subject: Subject) -> str:
    """The same first drafts with the verifier's generators in two different states, which proposing leaves as they are."""
    first, drawn = _first_drafts(subject, 1)
    again, _ = _first_drafts(subject, 1)
    other, _ = _first_drafts(subject, 2)
    expect(
        not drawn,
        "drafting draws from row.generator, never from a generator of the verifier",
        f"propose advanced the verifier's stream {', '.join(drawn)}",
    )
    changed = sum(a != b for a, b in zip(first, other, strict=True))
    unstable = sum(a != b for a, b in zip(first, again, strict=True))
    expect(
        unstable > 0 or changed == 0,
        "the same drafts whatever state the verifier's generators are in",
        f"{changed} of {len(first)} drafts change with them, and do not change otherwise",
    )
    expect_drafts(sum(map(len, first)))
    note = f"; {unstable} change from run to run by themselves" if unstable else ""
    return f"{len(first)} drafts, verifying streams untouched{note}"


def _first_drafts(subject: Subject, state: int) -> tuple[list[list[tuple[int, ...]]], list[str]]:
    folder = subject.targets.get(vocab_size=V, initializer_range=0.25)
    drafts: list[list[tuple[int, ...]]] = []
    drawn: list[str] = []

    def propose(batch: ProposalBatch, call: Callable[[], Proposal | None]) -> Proposal | None:
        generators = {stream: session.randomness.generator(stream) for stream in VERIFYING}
        if not drafts:
            for stream, generator in generators.items():
                generator.manual_seed(1000 * state + int(stream))
        before = {stream: generator.get_state() for stream, generator in generators.items()}
        proposal = call()
        drawn.extend(
            stream.name
            for stream, generator in generators.items()
            if stream.name not in drawn and not bool((generator.get_state() == before[stream]).all())
        )
        if not drafts:
            drafts.extend(draft.paths for draft in row_drafts(proposal, len(batch.rows), session.vocabulary))
        return proposal

    with subject.start(folder, max_num_seqs=_ROWS, max_num_batched_tokens=2000, seed=5) as session:
        session.around_propose(propose)
        for number in range(_ROWS):
            pattern = [3, 7, 5 + number % 4, 11]
            session.add(pattern * 3, SamplingParams(temperature=0.9, max_tokens=8, ignore_eos=True))
        session.finish()
    return drafts, drawn


STREAMS = Check(
    "streams",
    "drafts share no randomness with verification",
    "A draft that depends on the number that decides its acceptance biases the output, and wide vocabularies hide it.",
    "Draw with `row.generator`, or `specplug.sample`, never with a global generator or a seed of your own.",
    streams,
)
