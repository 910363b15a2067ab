"""The counters add up."""

from __future__ import annotations

from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check, CheckFailure, expect_drafts
from specplug.testing.drive import mixed_params
from specplug.testing.subject import Subject
from specplug.testing.targets import NARROW, narrow_prompt, repetitive_prompt


def run(subject: Subject) -> str:
    """For every request, and for the engine as the sum of them."""
    folder = subject.targets.get()
    with subject.start(folder, max_num_seqs=5) as session:
        requests = []
        for number in range(subject.scaled(24, 10)):
            is_narrow = number % 3 == 1
            length = 3 + 4 * (number % 6)
            prompt = (
                narrow_prompt(length, number) if is_narrow else repetitive_prompt(length, session.vocabulary, number)
            )
            allowed = NARROW if is_narrow else ()
            params = mixed_params(number, 1 + 3 * (number % 9), allowed_token_ids=allowed)
            params = params if number % 4 else SamplingParams(temperature=0, allowed_token_ids=allowed)
            requests += session.add(prompt, params)
        session.finish()
        engine = session.engine
        totals = (
            ("emitted tokens", engine.num_generated_tokens, sum(request.num_output_tokens for request in requests)),
            ("draft tokens", engine.stats.num_draft_tokens, sum(r.stats.num_draft_tokens for r in requests)),
            (
                "accepted",
                engine.stats.num_accepted_draft_tokens,
                sum(r.stats.num_accepted_draft_tokens for r in requests),
            ),
            ("drafts", engine.stats.num_spec_steps, sum(engine.stats.acceptance_histogram)),
        )
    for request in requests:
        stats = request.stats
        emitted, most = request.num_output_tokens, stats.num_accepted_draft_tokens + stats.num_steps
        drafted = sum(source is not None for source in request.sources)
        holds = {
            f"accepted {stats.num_accepted_draft_tokens} ≤ drafted {stats.num_draft_tokens}": (
                stats.num_accepted_draft_tokens <= stats.num_draft_tokens
            ),
            f"emitted {emitted} = accepted {stats.num_accepted_draft_tokens} + steps {stats.num_steps}, or one less": (
                emitted in (most, most - 1)
            ),
            f"tokens with a source {drafted} = accepted {stats.num_accepted_draft_tokens}": (
                drafted == stats.num_accepted_draft_tokens and len(request.sources) == emitted
            ),
        }
        for text, is_right in holds.items():
            if not is_right:
                raise CheckFailure(text, "it does not hold: committed tokens changed behind the engine's back")
    for name, total, parts in totals:
        if total != parts:
            raise CheckFailure(f"{name} of the engine = the sum over its requests, {parts}", f"{total}")
    drafted = engine.stats.num_draft_tokens
    expect_drafts(drafted)
    return f"{len(requests)} requests, {drafted} draft tokens"


CHECK = Check(
    "counters",
    "the counters add up",
    "Accepted ≤ drafted; emitted = accepted + steps, less what was cut: nothing is committed behind the engine's back.",
    "A `verify` of its own returns node indices and one next token per row, and nothing writes to a request.",
    run,
)
