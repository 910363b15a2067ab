"""Rows that begin in the prefix cache: their output, and the drafts for them."""

from __future__ import annotations

from typing import Any

from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check
from specplug.testing.driver import Recorder
from specplug.testing.failures import CheckFailure, expect, expect_drafts
from specplug.testing.reference import allowed_differences, choose, compare
from specplug.testing.subject import Subject
from specplug.testing.targets import repetitive_prompt

_TRUNK = 64
_CUTS = (64, 40, 64, 17, 64, 33)
_NEW_TOKENS = 16


def prefixes(subject: Subject) -> str:
    """Prompts that begin alike, first computed in chunks without a draft, then served: in few blocks, some of them forked."""
    folder = subject.targets.get()
    vocabulary = subject.targets.vocabulary(folder)
    trunk = repetitive_prompt(_TRUNK, vocabulary, 900)
    count = subject.scaled(18, 9)
    prompts = [
        trunk[: _CUTS[number % len(_CUTS)]] + repetitive_prompt(2 + 3 * number % 11, vocabulary, 901 + number)
        for number in range(count)
    ]
    params = [
        SamplingParams(
            temperature=(0.0, 0.9)[number % 2],
            seed=number,
            n=(1, 1, 2)[number % 3],
            max_tokens=_NEW_TOKENS,
            ignore_eos=True,
        )
        for number in range(count)
    ]
    with subject.plain(folder) as session:
        expected = session.generate(prompts, params)
    tight: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 44, "block_size": 4, "max_model_len": 160}
    with subject.start(folder, enable_prefix_caching=True, **tight) as session:
        session.limit_blocks(_TRUNK + 4 * (_NEW_TOKENS + session.speculator.scratch_tokens_per_row) + 120)
        recorder = Recorder(session)
        session.generate(prompts[:2], [SamplingParams(max_tokens=1, ignore_eos=True)] * 2)
        outputs = session.generate(prompts, params)
        stats, cache, traits = session.engine.stats, session.engine.prefix_cache, session.speculator.traits
        caches = [region for region in session.regions() if region.layers]
    assert cache is not None
    for number, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        if output != wanted:
            raise CheckFailure(f"the output of plain decoding: {wanted[:8]}…", f"{output[:8]}… of prompt {number}")
    expect(cache.num_hit_tokens > 0, "rows that begin in the prefix cache", "none")
    expect_drafts(stats.num_draft_tokens)
    compared = 0
    if not subject.learns:
        shares = traits.token_only or (bool(caches) and all(region.tables == "shared" for region in caches))
        chosen = choose([r for r in recorder.records if shares or not r.forked], subject.scaled(120, 60), seed=2)
        result = compare(subject, folder, chosen)
        compared = result.compared - result.random
        if len(result.wrong) > allowed_differences(result.compared):
            raise CheckFailure(
                "the drafts of a fresh speculator for the same tokens, where a row begins in the prefix cache (write the KV of "
                "every position that you are shown, with a budget of zero too: later rows with these tokens find it)",
                result.first_difference(),
            )
    return (
        f"{count} outputs alike, {cache.num_hit_tokens} of {cache.num_queried_tokens} tokens from the cache, "
        f"{compared} drafts alike"
    )


PREFIXES = Check(
    "prefixes",
    "rows that begin in the prefix cache get the same output, and drafts as good",
    "What a speculator stores in the target's blocks is found by later rows with the same tokens.",
    "Write the KV of all positions in `row.new_positions` before `propose` returns. A new row has your own entries for its "
    "first `row.num_cached_tokens` positions, and they may be read; nothing else of an earlier row may be.",
    prefixes,
)
