"""Decides tokens as verification would, and leaves them on the device: drawn where there are no drafts, else matched."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from specplug.model.device import to_device
from specplug.model.pending import PendingTokens
from specplug.request import Request
from specplug.sampling.distributions import argmax_there, process
from specplug.sampling.randomness import EngineRandomness, exponential_noise, race
from specplug.sampling.workspace import Workspace


def draws_ahead(request: Request) -> bool:
    """Whether a row's next token depends on nothing that the host must know first, and nothing else is to be said of it."""
    return request.draft is None and _is_plain(request)


def matches_ahead(request: Request) -> bool:
    """Whether `match` can decide what is accepted of a row's draft: a chain on the device, or none."""
    draft = request.draft
    is_there = draft is None or draft.is_unread
    return is_there and request.params.greedy and _is_plain(request) and not request.is_finished


def _is_plain(request: Request) -> bool:
    return (
        request.rules is None
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


def match(
    requests: Sequence[Request], offsets: Sequence[int], logits: torch.Tensor, pending: PendingTokens
) -> torch.Tensor:
    """How many draft tokens of greedy rows are accepted, and the tokens, as core's verifier decides.

    Args:
        requests: R rows; see `matches_ahead`.
        offsets: each row's first entry in `logits`; one more at the end.
        logits: [entries, vocabulary].
        pending: where the draft tokens are.

    Returns:
        int64 [R, 2 + K] on the device, K being the longest draft: the number of accepted tokens; then those and the one after
        them. What follows has no meaning. A token is -1 where the logits are NaN.
    """
    longest = max(end - begin for begin, end in itertools.pairwise(offsets))
    entries: list[int] = []
    nodes: list[int] = []
    for request, begin, end in zip(requests, offsets, offsets[1:], strict=False):
        missing = [end - 1] * (longest - (end - begin))
        entries += range(begin, end)
        entries += missing
        row = None if request.draft is None else request.draft.pending
        nodes += () if row is None else range(row.first, row.first + len(row))
        nodes += [-1] * len(missing)
    index = to_device([*entries, *nodes], logits.device)
    tokens = argmax_there(logits)[index[: len(entries)]].view(len(requests), longest)
    drafted = pending.at(index[len(entries) :], -2).view(len(requests), longest - 1)
    count = (tokens[:, :-1] == drafted).long().cumprod(1).sum(1, keepdim=True)
    return torch.cat([count, tokens], dim=1)
