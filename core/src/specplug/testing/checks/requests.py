"""Requests: nothing follows their end, their counters add up, and every step makes progress."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from specplug.contract.verification import Verdict
from specplug.request import Request
from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check
from specplug.testing.driver import mixed_params
from specplug.testing.failures import CheckFailure, expect, expect_drafts
from specplug.testing.models import word
from specplug.testing.subject import Subject
from specplug.testing.targets import NARROW, narrow_prompt, repetitive_prompt

_LENGTH = 20


def endings(subject: Subject) -> str:
    """End-of-sequence tokens, stop tokens, stop strings and max_tokens, at every position of known outputs."""
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


ENDINGS = Check(
    "endings",
    "nothing follows the end of a request inside an accepted run",
    "Stop tokens, stop strings and limits end the output where plain decoding ends it.",
    "A `verify` of its own accepts what core would have accepted, and leaves cutting the output to core.",
    endings,
)


def counters(subject: Subject) -> str:
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


COUNTERS = Check(
    "counters",
    "the counters add up",
    "Accepted ≤ drafted; emitted = accepted + steps, less what was cut: nothing is committed behind the engine's back.",
    "A `verify` of its own returns node indices and one next token per row, and nothing writes to a request.",
    counters,
)


_SECONDS = 0.5
_FIRST_LOOK = 6
_PROGRESS_LENGTH = 24


def progress(subject: Subject) -> str:
    """A verifier that rejects every draft: one token per row and step, no thrashing, no long thinking."""
    folder = subject.targets.get()

    def reject(requests: Sequence[Request], offsets: Sequence[int], logits: torch.Tensor) -> Verdict:
        first = [offset for offset, _ in zip(offsets, requests, strict=False)]
        return Verdict([[] for _ in requests], logits[first].argmax(dim=-1).tolist())

    with subject.start(folder, max_num_seqs=4, max_num_batched_tokens=256, max_model_len=96) as session:
        session.take_over_verification(reject)
        for number in range(8):
            prompt = repetitive_prompt(4 + 5 * number, session.vocabulary, number)
            session.add(prompt, mixed_params(number, _PROGRESS_LENGTH))
        chain, method = session.engine.chain, session.speculator.method

        def look(step: int) -> None:
            seconds = chain.seconds[method] / step
            expect(
                step < _FIRST_LOOK or seconds <= _SECONDS,
                f"at most {_SECONDS} s per propose for 4 rows of a tiny target",
                f"{seconds:.2f} s on average",
            )

        steps = session.finish(look)
        preemptions = session.engine.scheduler.num_preemptions
        seconds = chain.seconds[method] / steps
        drafted = session.engine.stats.num_draft_tokens
    expect(
        steps <= 2 * _PROGRESS_LENGTH + 8 and not preemptions,
        f"about {2 * _PROGRESS_LENGTH} steps for 8 requests of {_PROGRESS_LENGTH} tokens in 4 rows if all drafts are rejected",
        f"{steps} steps and {preemptions} preemptions: scratch entries or tables take the rows' blocks",
    )
    expect_drafts(drafted)
    return f"{steps} steps when all is rejected, {1000 * seconds:.1f} ms per propose"


PROGRESS = Check(
    "progress",
    "a useless draft still makes progress",
    "Rejected drafts cost neither tokens nor rows, and drafting takes no longer than it can be worth.",
    "Rejected entries must not take the place of live ones; keep what is done in `propose` bounded per row.",
    progress,
)
