"""Every sampling parameter holds at every draft position."""

from __future__ import annotations

from typing import Any

from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check, CheckFailure, expect_drafts
from specplug.testing.subject import Subject
from specplug.testing.targets import NARROW, narrow_prompt, repetitive_prompt
from specplug.testing.words import word

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


def run(subject: Subject) -> str:
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
                place = next((i for i, (a, b) in enumerate(zip(output, wanted, strict=False)) if a != b), len(output))
                raise CheckFailure(
                    f"the tokens of plain decoding with {case}: {wanted[: place + 3]}…", f"{output[: place + 3]}…"
                )
    expect_drafts(drafted)
    return f"{len(cases)} combinations, {accepted} draft tokens accepted"


CHECK = Check(
    "parameters",
    "every sampling parameter holds at every draft position",
    "Penalties count the draft's earlier tokens, bans hold inside a draft, rows with different parameters are not mixed up.",
    "A `verify` of its own compares with the target's processed distributions, never with raw logits.",
    run,
)
