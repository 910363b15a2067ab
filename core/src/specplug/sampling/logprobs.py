"""Log-probabilities of chosen and most likely tokens, in vLLM's shape."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch


@attrs.define
class Logprob:
    """One token at one position.

    Attributes:
        logprob: under the model's own distribution, before any sampling parameter.
        rank: its place among all tokens, from 1.
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
        count: how many most likely tokens to add; -1 for all.
    """
    if not tokens:
        return []
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = torch.tensor(list(tokens), device=logits.device)[:, None]
    own = logprobs.gather(1, chosen)
    ranks = (logprobs > own).sum(dim=-1) + 1
    count = logprobs.shape[-1] if count == -1 else min(count, logprobs.shape[-1])
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
