"""A seeded request has one output."""

from __future__ import annotations

from typing import Any

from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check, CheckFailure, expect_drafts
from specplug.testing.subject import Subject
from specplug.testing.targets import NARROW, narrow_prompt, repetitive_prompt

_REQUESTS = 7


def run(subject: Subject) -> str:
    """Plain decoding against the speculator: in order, backwards, and in a tight engine with preemption."""
    folder = subject.targets.get()
    vocabulary = subject.targets.vocabulary(folder)
    prompts = [repetitive_prompt(4 + 5 * number, vocabulary, number) for number in range(_REQUESTS)]
    prompts[1::2] = [narrow_prompt(len(prompt), number) for number, prompt in enumerate(prompts[1::2])]
    params = [
        SamplingParams(
            temperature=0.9,
            top_p=0.9,
            seed=100 + number,
            max_tokens=20,
            ignore_eos=True,
            allowed_token_ids=NARROW if number % 2 else (),
        )
        for number in range(_REQUESTS)
    ]
    with subject.plain(folder) as session:
        expected = session.generate(prompts, params)
    tight: dict[str, Any] = {"max_num_seqs": 3, "max_num_batched_tokens": 24, "block_size": 4, "max_model_len": 120}
    drafted = 0
    cases: tuple[tuple[str, dict[str, Any]], ...] = (("in order", {}), ("backwards", {}), ("in a tight engine", tight))
    for name, options in cases:
        order = list(range(_REQUESTS))
        if name != "in order":
            order.reverse()
        with subject.start(folder, seed=len(name), **options) as session:
            if options is tight:
                session.limit_blocks(76)
            outputs = session.generate([prompts[i] for i in order], [params[i] for i in order])
            drafted += session.engine.stats.num_draft_tokens
        for number, output in zip(order, outputs, strict=True):
            if output != expected[number]:
                raise CheckFailure(
                    f"the output of plain decoding for seed {100 + number}: {expected[number][:8]}…",
                    f"{output[:8]}… {name}",
                )
    expect_drafts(drafted)
    return f"{_REQUESTS} seeded requests, alike in order, backwards and preempted; {drafted} draft tokens"


CHECK = Check(
    "seeds",
    "a seeded request gives the same tokens in any batch, with or without the speculator",
    "Verification keyed by seed and position is not circumvented.",
    "A `verify` of its own draws with the row's generator and position, and depends on no other row.",
    run,
)
