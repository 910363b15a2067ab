"""Nothing follows the end of a request."""

from __future__ import annotations

from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check, CheckFailure
from specplug.testing.subject import Subject
from specplug.testing.targets import repetitive_prompt
from specplug.testing.words import word

_LENGTH = 20


def run(subject: Subject) -> str:
    """End-of-sequence tokens, stop tokens, stop strings and max_tokens, at every place of known outputs."""
    folder = subject.targets.get()
    vocabulary = subject.targets.vocabulary(folder)
    prompts = [repetitive_prompt(6 + 4 * number, vocabulary, 70 + number) for number in range(subject.scaled(8, 5))]
    whole = SamplingParams(temperature=0, max_tokens=_LENGTH, ignore_eos=True)
    with subject.plain(folder) as session:
        outputs = session.generate(prompts, [whole] * len(prompts))
    cases: list[tuple[str, list[int], SamplingParams, list[int]]] = []
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        token = output[(5 * number + 3) % _LENGTH]
        cut = output[: output.index(token) + 1]
        stop = SamplingParams(temperature=0, max_tokens=_LENGTH, ignore_eos=True, stop_token_ids=(token,))
        cases.append((f"stop_token_ids=({token},)", prompt, stop, cut))
        for limit in (1, 2, 3 + number):
            few = SamplingParams(temperature=0, max_tokens=limit, ignore_eos=True)
            cases.append((f"max_tokens={limit}", prompt, few, output[:limit]))
        if subject.targets.given is None:
            text = SamplingParams(temperature=0, max_tokens=_LENGTH, ignore_eos=True, stop=word(token))
            cases.append((f"stop={word(token)!r}", prompt, text, cut))
    with subject.start(folder, skip_tokenizer_init=subject.targets.given is not None) as session:
        _compare(session.generate([case[1] for case in cases], [case[2] for case in cases]), cases)
    end = outputs[0][7]
    greedy = SamplingParams(temperature=0, max_tokens=_LENGTH)
    cut_at = [(*output, end).index(end) + 1 for output in outputs]
    eos = [
        (f"end-of-sequence token {end}", prompt, greedy, output[:count])
        for prompt, output, count in zip(prompts, outputs, cut_at, strict=True)
    ]
    with subject.start(folder) as session:
        session.end_with(end)
        _compare(session.generate(prompts, [greedy] * len(prompts)), eos)
    return f"{len(cases) + len(eos)} endings"


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
    run,
)
