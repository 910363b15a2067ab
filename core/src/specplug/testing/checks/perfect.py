"""Where it must be right, it is accepted whole."""

from __future__ import annotations

from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check, NotApplicable, expect
from specplug.testing.subject import Subject

_LENGTH = 25


def run(subject: Subject) -> str:
    """Greedy and sampled requests with the author's perfect configuration: hardly a draft token is rejected."""
    folder = subject.targets.get()
    config = subject.make_perfect(folder)
    if config is None:
        raise NotApplicable("its test names no configuration with which it must be right (perfect_config)")
    pairs = subject.targets.decisive_prompts(folder, 6, _LENGTH)
    rates = []
    for temperature in (0.0, 0.8):
        params = SamplingParams(temperature=temperature, max_tokens=_LENGTH, ignore_eos=True)
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


CHECK = Check(
    "perfect",
    "a draft that must be right is accepted whole",
    "Positions, states and tokens are aligned: an offset by one shows here even where it is the same every time.",
    "The last committed token has no target state yet; the state of position i predicts token i + 1.",
    run,
)
