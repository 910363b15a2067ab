"""Draws the next tokens of rows without drafts and leaves them on the device: what verification would decide for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specplug.model.device import to_device
from specplug.request import Request
from specplug.sampling.distributions import argmax_there, process
from specplug.sampling.randomness import EngineRandomness, exponential_noise, race
from specplug.sampling.workspace import Workspace


def draws_ahead(request: Request) -> bool:
    """Whether a row's next token depends on nothing that the host must know first, and nothing else is to be said of it."""
    return (
        request.draft is None
        and request.rules is None
        and request.params.logprobs is None
        and not request.num_missing_prompt_logprobs
        and not request.is_traced
        and not request.fork_group
    )


def draw(
    requests: Sequence[Request], logits: torch.Tensor, randomness: EngineRandomness, workspace: Workspace
) -> torch.Tensor:
    """One token per row, as `matching.sample_and_match` draws it.

    Args:
        requests: the rows; see `draws_ahead`.
        logits: [rows, vocabulary].
        randomness: the engine's.
        workspace: for distributions and noise.

    Returns:
        int64 [rows] on the device; -1 where the logits are NaN.
    """
    greedy = [row for row, request in enumerate(requests) if request.params.greedy]
    if len(greedy) == len(requests):
        return argmax_there(logits)
    workspace.begin_step()
    sampled = [row for row, request in enumerate(requests) if not request.params.greedy]
    rows = to_device(sampled, logits.device)
    chosen = [requests[row] for row in sampled]
    probs = process(logits[rows] if greedy else logits, [r.params for r in chosen], workspace.probs(len(chosen)))
    is_broken = probs[:, 0].isnan()
    keys = [(request.randomness, request.num_output_tokens) for request in chosen]
    tokens = race(probs, exponential_noise(keys, probs.shape[-1], randomness, workspace.noise(len(keys))))
    tokens = torch.where(is_broken, -1, tokens)
    if not greedy:
        return tokens
    together = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
    own = to_device(greedy, logits.device)
    together[own] = argmax_there(logits[own])
    together[rows] = tokens
    return together
