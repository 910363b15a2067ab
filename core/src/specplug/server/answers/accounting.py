"""What a response says about itself: token counts, and speculation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs

from specplug.outputs import RequestOutput
from specplug.server.settings import SpeculativeMetrics
from specplug.server.state import ServerState
from specplug.stats import SpeculationStats


@attrs.define
class Usage:
    """Token counts of a request; outputs of streams add to it.

    Attributes:
        prompt_tokens: of all its prompts.
        cached_tokens: those of them that were taken from the prefix cache.
        completion_tokens: generated so far.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def of(cls, outputs: Iterable[RequestOutput]) -> Usage:
        """The counts of finished outputs."""
        usage = cls()
        for output in outputs:
            usage.add_prompt(output)
            usage.completion_tokens += sum(len(each.token_ids) for each in output.outputs)
        return usage

    def add_prompt(self, output: RequestOutput) -> None:
        """Counts the prompt of an output."""
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens

    def as_json(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def speculation_of(state: ServerState, stats: Iterable[SpeculationStats]) -> dict[str, Any] | None:
    """The `metrics` of a response, as the server is set up to give them."""
    config = state.engine.config.speculative
    length = 0 if config is None else config.num_speculative_tokens
    return speculation(stats, state.settings.speculative_metrics, length)


def speculation(
    stats: Iterable[SpeculationStats], level: SpeculativeMetrics, num_speculative_tokens: int
) -> dict[str, Any] | None:
    """The `metrics` of a response, with vLLM's names; None if they are not wanted.

    Args:
        stats: of its completions.
        level: how much.
        num_speculative_tokens: the most draft tokens of a step.
    """
    if level == "none":
        return None
    total = SpeculationStats()
    for each in stats:
        total.add(each)
    found: dict[str, Any] = {
        "mean_acceptance_length": total.mean_acceptance_length,
        "draft_acceptance_rate": total.draft_acceptance_rate,
        "num_spec_steps": total.num_spec_steps,
        "num_draft_tokens": total.num_draft_tokens,
        "num_accepted_draft_tokens": total.num_accepted_draft_tokens,
        "num_spec_tokens": num_speculative_tokens,
    }
    if level == "detailed":
        found["acceptance_histogram"] = total.acceptance_histogram
        found["num_steps"] = total.num_steps
        found["by_method"] = {method: attrs.asdict(counts) for method, counts in total.by_method.items()}
    return {"speculative_decoding": found}
