"""Sampled output is distributed as the target's own."""

from __future__ import annotations

from pathlib import Path

import torch

from specplug.sampling.distributions import process
from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check, CheckFailure, expect_drafts
from specplug.testing.statistics import THRESHOLD, joint_p_values
from specplug.testing.subject import Subject

V = 16
SAMPLING = SamplingParams(temperature=0.8, top_k=11, max_tokens=5, ignore_eos=True)
_BATCH = 250
_PERIOD = 5
_PATTERNS = 200


def run(subject: Subject) -> str:
    """Thousands of unseeded requests with one prompt; chi-square per position and on the joint of three tokens."""
    folder = subject.targets.get(vocab_size=V, initializer_range=0.25)
    ids = tuple(range(V)) if subject.targets.vocabulary(folder) > V else ()
    params = SamplingParams(temperature=0.8, top_k=11, max_tokens=5, ignore_eos=True, allowed_token_ids=ids)
    trials = subject.scaled(12_000, 2_000)
    prompt = continuing_prompt(subject, folder)
    with subject.start(folder, max_num_seqs=_BATCH, max_num_batched_tokens=4000, max_model_len=32, seed=1) as session:
        outputs = session.generate([prompt] * trials, [params] * trials)
        stats = session.engine.stats
    samples = torch.tensor([output[:3] for output in outputs])
    values = joint_p_values(samples, joint_of_three(subject, folder, prompt))
    for what, value in values.items():
        if value < THRESHOLD:
            raise CheckFailure(
                f"the target's own distribution after temperature and top_k, over {V} tokens and {trials:,} trials "
                f"(a p-value of at least {THRESHOLD:g})",
                f"p = {value:.2g} for {what}; {stats.num_accepted_draft_tokens} of {stats.num_draft_tokens} accepted",
            )
    expect_drafts(stats.num_draft_tokens)
    worst = min(values.values())
    rate = stats.num_accepted_draft_tokens / stats.num_draft_tokens
    return f"{trials:,} trials, smallest p-value {worst:.2g}, {rate:.0%} of {stats.num_draft_tokens:,} draft tokens accepted"


def continuing_prompt(subject: Subject, folder: Path) -> list[int]:
    """A pattern, repeated, that the target itself is likely to go on with: methods that look tokens up draft there."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.stack([torch.randperm(V, generator=generator)[:_PERIOD] for _ in range(_PATTERNS)])
    known = 3 * _PERIOD
    batch = patterns.repeat(1, 4)
    with torch.no_grad():
        logits = subject.targets.reference(folder)(batch, use_cache=False).logits[:, known - 1 : -1, :V].float()
    likely = process(logits.flatten(0, 1), [SAMPLING] * logits.shape[0] * logits.shape[1]).view_as(logits)
    chances = likely.gather(2, batch[:, known:, None])[..., 0]
    best = int((chances[:, 0] * chances[:, 1:3].mean(dim=1)).argmax())
    return [int(token) for token in batch[best, :known]]


def joint_of_three(subject: Subject, folder: Path, prompt: list[int]) -> torch.Tensor:
    """Exact float64 [V, V, V] probabilities of the first three tokens, from Transformers' own logits."""
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    batch = torch.cat([torch.tensor([prompt]).expand(V * V, -1), pairs], dim=1)
    with torch.no_grad():
        logits = subject.targets.reference(folder)(batch, use_cache=False).logits[:, len(prompt) - 1 :, :V]
    first, second, third = (process(logits[:, i].float(), [SAMPLING] * V * V).double() for i in range(3))
    prefix = first[0][pairs[:, 0]] * second[torch.arange(V * V), pairs[:, 1]]
    return (prefix[:, None] * third).view(V, V, V)


CHECK = Check(
    "sampling",
    "sampled output is distributed as the target's own",
    "What it reports, draws and leaves out does not bias the output: a small vocabulary shows what wide ones hide.",
    "Sampled drafts must report what they were drawn from, temperature and truncation included; a token must not "
    "be left out because of which one it was.",
    run,
)
