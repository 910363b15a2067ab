"""Selects the next draft token of every row from the draft model's logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import torch

from specplug import argmax_with_prob, process
from specplug import sample as draw_tokens

if TYPE_CHECKING:
    from specplug import ProposalRow


@attrs.frozen(eq=False)
class Draws:
    """The next token of each row.

    Attributes:
        tokens: per row the token's index among the shared tokens; None if the row stops here.
        probs: per row the distribution that the token was sampled from, float32 [S]; None for a deterministic token.
        chances: per row the probability of an argmax token, if it was computed; None for a sampled token.
    """

    tokens: list[int | None]
    probs: list[torch.Tensor | None]
    chances: list[float | None]


def draw(
    logits: torch.Tensor, rows: Sequence[ProposalRow], *, sample: bool, threshold: float, asks: bool = False
) -> Draws:
    """Selects one token per row.

    Whether a row continues depends on its distribution, before a token is sampled from it: dropping a token because of its
    value would bias verification.

    Args:
        logits: [N, S], the draft model's logits of the shared tokens.
        rows: the N rows.
        sample: whether rows that are verified by rejection sampling get sampled tokens; else all get argmax tokens.
        threshold: a row stops if its most likely token is less probable.
        asks: whether probabilities of argmax tokens are needed; on a CPU they cost nothing.
    """
    sampled = [index for index, row in enumerate(rows) if sample and row.gains_by_sampling]
    distributions: list[torch.Tensor | None] = [None] * len(rows)
    chances: list[float | None] = [None] * len(rows)
    if len(sampled) < len(rows):
        tokens, chances = _best(logits, asks or threshold > 0.0)
        going = [chance is None or chance >= threshold for chance in chances]
    else:
        tokens, going = [0] * len(rows), [True] * len(rows)
    if sampled:
        chosen = (
            logits
            if len(sampled) == len(rows)
            else logits[torch.tensor(sampled, device=logits.device, dtype=torch.long)]
        )
        probs = process(chosen, [rows[index].sampling for index in sampled])
        confident = (probs.amax(dim=-1) >= threshold).tolist() if threshold else [True] * len(sampled)
        drawn = draw_tokens(probs, [rows[index].generator for index in sampled])[:, 0].tolist()
        for place, index in enumerate(sampled):
            tokens[index], going[index] = drawn[place], confident[place]
            distributions[index], chances[index] = probs[place], None
    return Draws([token if goes else None for token, goes in zip(tokens, going, strict=True)], distributions, chances)


def _best(logits: torch.Tensor, asks: bool) -> tuple[list[int], list[float | None]]:
    """The most likely token of every row, and its probability. On a GPU that costs extra: there it is None unless asked for."""
    if logits.device.type == "cpu":
        ids, chances = argmax_with_prob(logits)
        return ids.tolist(), chances.tolist()
    if not asks:
        return logits.max(dim=-1).indices.tolist(), [None] * len(logits)
    columns = torch.stack(
        [part.double() for part in argmax_with_prob(logits)]
    ).tolist()  # one copy; float64 holds every index
    return [int(token) for token in columns[0]], columns[1]
