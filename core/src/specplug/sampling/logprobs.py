"""Log-probabilities of chosen and most likely tokens, in vLLM's shape."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from specplug.model.device import to_device
from specplug.sampling.distributions import rows_at_once


@attrs.define
class Logprob:
    """One token at one position.

    Attributes:
        logprob: under the model's own distribution, before any sampling parameter.
        rank: its rank among all tokens, from 1.
        decoded_token: its text; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]


def gather_logprobs(logits: torch.Tensor, tokens: Sequence[int], count: int) -> list[PositionLogprobs]:
    """The chosen token and the most likely ones, for each position.

    Args:
        logits: [N, V], the model's own.
        tokens: the chosen token of each position.
        count: the number of most likely tokens to add; -1 for all.
    """
    if not tokens:
        return []
    vocabulary = logits.shape[-1]
    count = vocabulary if count == -1 else min(count, vocabulary)
    step = rows_at_once(vocabulary)
    result: list[PositionLogprobs] = []
    for begin in range(0, len(tokens), step):
        result += _gather(logits[begin : begin + step], tokens[begin : begin + step], count)
    return result


def _gather(logits: torch.Tensor, tokens: Sequence[int], count: int) -> list[PositionLogprobs]:
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, to_device(list(tokens), logits.device)[:, None])
    ranks = (logprobs > own).sum(dim=-1) + 1
    values, ids = logprobs.topk(count, dim=-1)
    result: list[PositionLogprobs] = []
    for token, logprob, rank, top_values, top_ids in zip(
        tokens, own[:, 0].tolist(), ranks.tolist(), values.tolist(), ids.tolist(), strict=True
    ):
        position = {token: Logprob(logprob, rank)}
        for place, (top_id, value) in enumerate(zip(top_ids, top_values, strict=True), start=1):
            position.setdefault(top_id, Logprob(value, place))
        result.append(position)
    return result
