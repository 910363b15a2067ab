"""Greedy output is the target's own, token for token."""

from __future__ import annotations

from typing import Any

from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check, CheckFailure, expect_drafts
from specplug.testing.session import Session
from specplug.testing.subject import Subject

NEW_TOKENS = 24


def run(subject: Subject) -> str:
    """On every architecture: alone, in a ragged batch, and in a tight engine with chunks, preemption, forks and aborts."""
    compared = drafted = accepted = 0
    names = subject.used_architectures()
    for architecture in names:
        folder = subject.targets.get() if architecture == "given" else subject.targets.get(architecture)
        pairs = subject.targets.decisive_prompts(folder, subject.scaled(8, 6), NEW_TOKENS)
        roomy: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 512}
        tight: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 40, "block_size": 4, "max_model_len": 120}
        for name, options in (("ragged batch", roomy), ("chunks, preemption, forks and aborts", tight)):
            with subject.start(folder, **options) as session:
                if options is tight:
                    session.limit_blocks(96)
                compared += _compare(session, pairs, f"{architecture}, {name}", disturbed=options is tight)
                drafted += session.engine.stats.num_draft_tokens
                accepted += session.engine.stats.num_accepted_draft_tokens
    subject.targets.forget()
    expect_drafts(drafted)
    return f"{compared} outputs on {', '.join(names)}; {accepted} draft tokens accepted"


def _compare(session: Session, pairs: list[tuple[list[int], list[int]]], where: str, *, disturbed: bool) -> int:
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    forked = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, n=2)
    families = [
        session.add(prompt, forked if disturbed and number % 3 == 0 else params)
        for number, (prompt, _) in enumerate(pairs)
    ]
    doomed = session.add(pairs[0][0][:-1], params)[0] if disturbed else None

    def abort(step: int) -> None:
        if doomed is not None and doomed.num_output_tokens >= 3:
            session.engine.abort(doomed.id)

    session.finish(abort)
    for family, (prompt, expected) in zip(families, pairs, strict=True):
        for request in family:
            output = request.output_ids
            if output != expected:
                place = next((i for i, (a, b) in enumerate(zip(output, expected, strict=False)) if a != b), len(output))
                raise CheckFailure(
                    f"the tokens of plain greedy decoding by Transformers, …{expected[max(0, place - 2) : place + 4]}",
                    f"…{output[max(0, place - 2) : place + 4]} from token {place} on, prompt of {len(prompt)} ({where})",
                )
    return sum(map(len, families))


CHECK = Check(
    "greedy",
    "greedy output is that of plain decoding, token for token",
    "Drafts are fixed before they are verified, rows are not mixed up, and a verify of its own is exact.",
    "Look at `verify`, at anything that is changed in place in the batch, and at how rows are paired with drafts.",
    run,
)
