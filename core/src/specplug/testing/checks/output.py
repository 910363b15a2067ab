"""Output: that of plain decoding, whatever is drafted."""

from __future__ import annotations

from typing import Any

from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check
from specplug.testing.failures import CheckFailure, NotApplicable, expect, expect_drafts
from specplug.testing.models import word
from specplug.testing.session import Session
from specplug.testing.subject import Subject
from specplug.testing.targets import NARROW, narrow_prompt, repetitive_prompt

NEW_TOKENS = 24


def greedy(subject: Subject) -> str:
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
                position = next(
                    (i for i, (a, b) in enumerate(zip(output, expected, strict=False)) if a != b), len(output)
                )
                raise CheckFailure(
                    f"the tokens of plain greedy decoding by Transformers, …{expected[max(0, position - 2) : position + 4]}",
                    f"…{output[max(0, position - 2) : position + 4]} from token {position}, prompt of {len(prompt)} ({where})",
                )
    return sum(map(len, families))


GREEDY = Check(
    "greedy",
    "greedy output is that of plain decoding, token for token",
    "Drafts are fixed before they are verified, rows are not mixed up, and a verify of its own is exact.",
    "Look at `verify`, at anything that is changed in place in the batch, and at how rows are paired with drafts.",
    greedy,
)


_REQUESTS = 7


def seeds(subject: Subject) -> str:
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


SEEDS = Check(
    "seeds",
    "a seeded request gives the same tokens in any batch, with or without the speculator",
    "Verification keyed by seed and position is not circumvented.",
    "A `verify` of its own draws with the row's generator and position, and depends on no other row.",
    seeds,
)


_LENGTH = 18
_CASES: tuple[dict[str, Any], ...] = (
    {"temperature": 0, "repetition_penalty": 1.5},
    {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.7},
    {"temperature": 0, "logit_bias": {5: 4.0, 9: -6.0}},
    {"temperature": 0, "allowed_token_ids": (3, 5, 8, 9, 11, 12)},
    {"temperature": 0, "min_tokens": 9, "stop_token_ids": (4, 5, 6, 7, 8)},
    {"temperature": 0.9, "seed": 3, "top_k": 3, "repetition_penalty": 1.3},
    {"temperature": 1.2, "seed": 4, "top_p": 0.7, "frequency_penalty": 1.0},
    {"temperature": 1.0, "seed": 5, "min_p": 0.1, "allowed_token_ids": (3, 5, 8, 9, 11, 12)},
    {"temperature": 1.0, "top_k": 1, "presence_penalty": 1.5},
    {"temperature": 0, "allowed_token_ids": NARROW, "frequency_penalty": 0.1},
    {"temperature": 1.1, "seed": 7, "allowed_token_ids": NARROW, "repetition_penalty": 1.1},
)


def parameters(subject: Subject) -> str:
    """Rows with different parameters in one batch, against plain decoding."""
    folder = subject.targets.get()
    vocabulary = subject.targets.vocabulary(folder)
    cases: list[dict[str, Any]] = list(_CASES)
    no_words = subject.targets.given is not None  # nor need such a target have a tokenizer at all
    if not no_words:
        cases.append({"temperature": 0, "bad_words": [word(token) for token in (5, 7, 9)]})
        cases.append({"temperature": 0.8, "seed": 6, "bad_words": [f"{word(3)} {word(5)}"], "repetition_penalty": 0.8})
    params = [SamplingParams(max_tokens=_LENGTH, ignore_eos=True, **case) for case in cases]
    drafted = accepted = 0
    for variant in range(subject.scaled(4, 2)):
        prompts = [
            narrow_prompt(5 + 3 * number, number + 50 * variant)
            if case.get("allowed_token_ids") == NARROW
            else repetitive_prompt(5 + 3 * number, vocabulary, number + 50 * variant)
            for number, case in enumerate(cases)
        ]
        with subject.plain(folder, skip_tokenizer_init=no_words) as session:
            expected = session.generate(prompts, params)
        with subject.start(folder, skip_tokenizer_init=no_words, max_num_seqs=6) as session:
            outputs = session.generate(prompts, params)
            drafted += session.engine.stats.num_draft_tokens
            accepted += session.engine.stats.num_accepted_draft_tokens
        for case, output, wanted in zip(cases, outputs, expected, strict=True):
            if output != wanted:
                position = next(
                    (i for i, (a, b) in enumerate(zip(output, wanted, strict=False)) if a != b), len(output)
                )
                raise CheckFailure(
                    f"the tokens of plain decoding with {case}: {wanted[: position + 3]}…", f"{output[: position + 3]}…"
                )
    expect_drafts(drafted)
    return f"{len(cases)} combinations, {accepted} draft tokens accepted"


PARAMETERS = Check(
    "parameters",
    "every sampling parameter holds at every draft position",
    "Penalties count the draft's earlier tokens, bans hold inside a draft, rows with different parameters are not mixed up.",
    "A `verify` of its own compares with the target's processed distributions, never with raw logits.",
    parameters,
)


_PERFECT_LENGTH = 25


def perfect(subject: Subject) -> str:
    """Greedy and sampled requests with the author's perfect configuration: hardly a draft token is rejected."""
    folder = subject.targets.get()
    config = subject.make_perfect(folder)
    if config is None:
        raise NotApplicable("its test names no configuration with which it must be right (perfect_config)")
    pairs = subject.targets.decisive_prompts(folder, 6, _PERFECT_LENGTH)
    rates = []
    for temperature in (0.0, 0.8):
        params = SamplingParams(temperature=temperature, max_tokens=_PERFECT_LENGTH, ignore_eos=True)
        with subject.start(folder, config=config) as session:
            session.generate([prompt for prompt, _ in pairs], [params] * len(pairs))
            stats = session.engine.stats
        expect(stats.num_draft_tokens > 0, "drafts", f"none at temperature {temperature}")
        rates.append(stats.mean_acceptance_length or 0.0)
        if temperature == 0:
            histogram = stats.acceptance_histogram
            whole = stats.num_draft_tokens == stats.num_accepted_draft_tokens
            expect(
                whole or (stats.draft_acceptance_rate is not None and stats.draft_acceptance_rate > 0.97),
                "that every greedy draft is accepted whole",
                f"{stats.num_accepted_draft_tokens} of {stats.num_draft_tokens} tokens, by accepted length: {histogram}",
            )
    return f"{rates[0]:.2f} tokens per step greedy, {rates[1]:.2f} sampled"


PERFECT = Check(
    "perfect",
    "a draft that must be right is accepted whole",
    "Positions, states and tokens are aligned: an offset by one shows here even where it is the same every time.",
    "The last committed token has no target state yet; the state of position i predicts token i + 1.",
    perfect,
)
