"""Drafts share no randomness with verification."""

from __future__ import annotations

from collections.abc import Callable

from specplug.contract.types import Proposal, ProposalBatch
from specplug.sampling.params import SamplingParams
from specplug.sampling.randomness import Stream
from specplug.testing.check import Check, expect, expect_drafts
from specplug.testing.drafts import row_drafts
from specplug.testing.subject import Subject

VERIFYING = (Stream.TARGET, Stream.ACCEPTANCE, Stream.RESIDUAL)
V = 16
_ROWS = 24


def run(subject: Subject) -> str:
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


CHECK = Check(
    "streams",
    "drafts share no randomness with verification",
    "A draft that depends on the number that decides its acceptance biases the output, and wide vocabularies hide it.",
    "Draw with `row.generator`, or `specplug.sample`, never with a global generator or a seed of your own.",
    run,
)
