"""Completions as JSON objects, a line each."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from specplug.outputs import CompletionOutput, RequestOutput
    from specplug.sampling.logprobs import Logprob
    from specplug.stats import SpeculationStats


def completion_line(request: RequestOutput, completion: CompletionOutput) -> str:
    """One completion. Keys are only ever added; log-probabilities are there where they were asked for."""
    item: dict[str, Any] = {
        "request_id": request.request_id,
        "index": completion.index,
        "prompt": request.prompt,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "metrics": _metrics(completion.metrics),
        "unverified_methods": completion.unverified_methods,
    }
    if completion.error is not None:
        item["error"] = completion.error
    if completion.logprobs is not None:
        item["cumulative_logprob"] = _finite(completion.cumulative_logprob)
        item["logprobs"] = [_position(position) for position in completion.logprobs]
    if request.prompt_logprobs is not None:
        item["prompt_logprobs"] = [position and _position(position) for position in request.prompt_logprobs]
    return json.dumps(item)


def _metrics(stats: SpeculationStats) -> dict[str, Any]:
    return {
        **attrs.asdict(stats),
        "mean_acceptance_length": stats.mean_acceptance_length,
        "draft_acceptance_rate": stats.draft_acceptance_rate,
    }


def _position(position: dict[int, Logprob]) -> list[dict[str, Any]]:
    return [
        {"token_id": token, "logprob": _finite(entry.logprob), "rank": entry.rank, "text": entry.decoded_token}
        for token, entry in position.items()
    ]


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None
