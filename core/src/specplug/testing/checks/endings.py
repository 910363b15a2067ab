"""Nothing follows the end of a request."""

from __future__ import annotations

import attrs

from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check, CheckFailure, expect_drafts
from specplug.testing.subject import Subject
from specplug.testing.targets import NARROW, narrow_prompt, repetitive_prompt
from specplug.testing.words import word

_LENGTH = 20


def run(subject: Subject) -> str:
    """End-of-sequence tokens, stop tokens, stop strings and max_tokens, at every place of known outputs."""
    folder = subject.targets.get()
    vocabulary = subject.targets.vocabulary(folder)
    prompts = [repetitive_prompt(6 + 4 * number, vocabulary, 70 + number) for number in range(subject.scaled(8, 5))]
    prompts[1::2] = [narrow_prompt(len(prompt), number) for number, prompt in enumerate(prompts[1::2])]
    whole = [
        SamplingParams(
            temperature=0, max_tokens=_LENGTH, ignore_eos=True, allowed_token_ids=NARROW if number % 2 else ()
        )
        for number in range(len(prompts))
    ]
    with subject.plain(folder) as session:
        outputs = session.generate(prompts, whole)
    cases: list[tuple[str, list[int], SamplingParams, list[int]]] = []
    for number, (prompt, params, output) in enumerate(zip(prompts, whole, outputs, strict=True)):
        token = max(output, key=output.index)
        cut = output[: output.index(token) + 1]
        cases.append((f"stop_token_ids=({token},)", prompt, attrs.evolve(params, stop_token_ids=(token,)), cut))
        cases.extend(
            (f"max_tokens={limit}", prompt, attrs.evolve(params, max_tokens=limit), output[:limit])
            for limit in (1, 2, 3 + number, _LENGTH - number)
        )
        if subject.targets.given is None:
            cases.append((f"stop={word(token)!r}", prompt, attrs.evolve(params, stop=word(token)), cut))
    with subject.start(folder, skip_tokenizer_init=subject.targets.given is not None) as session:
        _compare(session.generate([case[1] for case in cases], [case[2] for case in cases]), cases)
        drafted = session.engine.stats.num_draft_tokens
    end = outputs[0][7]
    cut_at = [(*output, end).index(end) + 1 for output in outputs]
    eos = [
        (f"end-of-sequence token {end}", prompt, attrs.evolve(params, ignore_eos=False), output[:count])
        for prompt, params, output, count in zip(prompts, whole, outputs, cut_at, strict=True)
    ]
    with subject.start(folder) as session:
        session.end_with(end)
        _compare(session.generate(prompts, [case[2] for case in eos]), eos)
    expect_drafts(drafted)
    return f"{len(cases) + len(eos)} endings, {drafted} draft tokens"


def _compare(outputs: list[list[int]], cases: list[tuple[str, list[int], SamplingParams, list[int]]]) -> None:
    for output, (name, _, _, expected) in zip(outputs, cases, strict=True):
        if output != expected:
            raise CheckFailure(
                f"{len(expected)} tokens with {name}: …{expected[-4:]}", f"{len(output)}: …{output[-4:]}"
            )


CHECK = Check(
    "endings",
    "nothing follows the end of a request inside an accepted run",
    "Stop tokens, stop strings and limits end the output where plain decoding ends it.",
    "A `verify` of its own accepts what core would have accepted, and leaves cutting the output to core.",
    run,
)
