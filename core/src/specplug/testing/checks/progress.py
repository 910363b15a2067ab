"""Even when nothing is accepted, every step commits a token, and drafting takes bounded time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specplug.contract.types import Verdict
from specplug.request import Request
from specplug.testing.check import Check, expect, expect_drafts
from specplug.testing.drive import mixed_params
from specplug.testing.subject import Subject
from specplug.testing.targets import repetitive_prompt

_SECONDS = 0.5
_FIRST_LOOK = 6
_LENGTH = 24


def run(subject: Subject) -> str:
    """A verifier that rejects every draft: one token per row and step, no thrashing, no long thinking."""
    folder = subject.targets.get()

    def reject(requests: Sequence[Request], offsets: Sequence[int], logits: torch.Tensor) -> Verdict:
        first = [offset for offset, _ in zip(offsets, requests, strict=False)]
        return Verdict([[] for _ in requests], logits[first].argmax(dim=-1).tolist())

    with subject.start(folder, max_num_seqs=4, max_num_batched_tokens=256, max_model_len=96) as session:
        session.take_over_verification(reject)
        for number in range(8):
            prompt = repetitive_prompt(4 + 5 * number, session.vocabulary, number)
            session.add(prompt, mixed_params(number, _LENGTH))
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
        steps <= 2 * _LENGTH + 8 and not preemptions,
        f"about {2 * _LENGTH} steps for 8 requests of {_LENGTH} tokens in 4 rows when every draft is rejected",
        f"{steps} steps and {preemptions} preemptions: scratch entries or tables take the rows' blocks",
    )
    expect_drafts(drafted)
    return f"{steps} steps when all is rejected, {1000 * seconds:.1f} ms per propose"


CHECK = Check(
    "progress",
    "a useless draft still makes progress",
    "Rejected drafts cost neither tokens nor rows, and drafting takes no longer than it can be worth.",
    "Rejected entries must not take the place of live ones; keep what is done in `propose` bounded per row.",
    run,
)
