"""Checking a proposal against the contract. What does not hold is a fault of the plugin, never of the output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from specplug.contract.batch import Budget
from specplug.contract.proposal import DraftDistributions, Proposal
from specplug.errors import PluginError
from specplug.speculation.draft import Draft, depths_of

_SUM_TOLERANCE = 1e-3


def check_proposal(
    proposal: Proposal | None, budgets: Sequence[Budget], method: str, vocab_size: int
) -> list[Draft | None]:
    """Turns a proposal into one checked draft per row (None: no draft).

    Raises:
        PluginError: the proposal breaks the contract; the message says where.
    """
    if proposal is None:
        return [None] * len(budgets)
    if not isinstance(proposal, Proposal):
        raise PluginError(f"propose returned {type(proposal).__name__}, expected a Proposal or None")
    rows = _token_lists(proposal)
    if len(rows) != len(budgets):
        raise PluginError(f"propose returned {len(rows)} rows for a batch of {len(budgets)}")
    for name in ("parents", "scores", "probs"):
        values = getattr(proposal, name)
        if values is not None and len(values) != len(rows):
            raise PluginError(f"proposal.{name} has {len(values)} rows for a batch of {len(rows)}")
    drafts: list[Draft | None] = []
    for row, (tokens, budget) in enumerate(zip(rows, budgets, strict=True)):
        if not tokens:
            drafts.append(None)
            continue
        where = f"row {row}"
        parents = None if proposal.parents is None else proposal.parents[row]
        scores = None if proposal.scores is None else proposal.scores[row]
        probs = None if proposal.probs is None else proposal.probs[row]
        _check_tokens(tokens, budget, vocab_size, where)
        parent_list = _check_parents(parents, tokens, budget, where)
        score_list = _check_scores(scores, parent_list, tokens, where)
        if probs is not None:
            if score_list is not None:
                raise PluginError(f"{where}: scores are for deterministic trees; this row has probs")
            _check_probs(probs, tokens, parent_list, vocab_size, where)
        drafts.append(Draft(method, tokens, parent_list, score_list, probs))
    return drafts


def _token_lists(proposal: Proposal) -> list[list[int]]:
    tokens: Any = proposal.tokens
    if isinstance(tokens, torch.Tensor):
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise PluginError(
                f"proposal.tokens has shape {tuple(tokens.shape)} and dtype {tokens.dtype}, expected integers [rows, K]"
            )
        lists = tokens.tolist()
        if proposal.lengths is not None:
            lists = [row[:length] for row, length in zip(lists, proposal.lengths, strict=True)]
        return lists
    return [row.tolist() if isinstance(row, torch.Tensor) else list(row) for row in tokens]


def _check_tokens(tokens: list[int], budget: Budget, vocab_size: int, where: str) -> None:
    if len(tokens) > budget.max_nodes:
        raise PluginError(f"{where}: {len(tokens)} draft tokens, the budget is {budget.max_nodes}")
    for token in tokens:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise PluginError(f"{where}: draft token {token!r} is not an id of the target's vocabulary of {vocab_size}")


def _check_parents(parents: Sequence[int] | None, tokens: list[int], budget: Budget, where: str) -> list[int] | None:
    if parents is None:
        if len(tokens) > budget.max_depth:
            raise PluginError(f"{where}: a chain of {len(tokens)} tokens, the deepest allowed is {budget.max_depth}")
        return None
    listed = [int(parent) for parent in parents]
    if len(listed) != len(tokens):
        raise PluginError(f"{where}: {len(listed)} parents for {len(tokens)} draft tokens")
    for node, parent in enumerate(listed):
        if not -1 <= parent < node:
            raise PluginError(
                f"{where}: node {node} has parent {parent}; parents come before their children, -1 is the root"
            )
    deepest = max(depths_of(listed))
    if deepest > budget.max_depth:
        raise PluginError(f"{where}: a tree of depth {deepest}, the deepest allowed is {budget.max_depth}")
    return listed


def _check_scores(
    scores: Sequence[float] | None, parents: list[int] | None, tokens: list[int], where: str
) -> list[float] | None:
    if scores is None:
        return None
    listed = [float(score) for score in scores]
    if len(listed) != len(tokens):
        raise PluginError(f"{where}: {len(listed)} scores for {len(tokens)} draft tokens")
    for node, score in enumerate(listed):
        parent = node - 1 if parents is None else parents[node]
        if not math.isfinite(score):
            raise PluginError(f"{where}: node {node} has the score {score}")
        if parent >= 0 and score > listed[parent]:
            raise PluginError(f"{where}: node {node} scores higher than its parent {parent}")
    return listed


def _check_probs(
    probs: DraftDistributions, tokens: list[int], parents: list[int] | None, vocab_size: int, where: str
) -> None:
    values = probs.values
    if not isinstance(values, torch.Tensor) or values.dim() != 2 or not values.is_floating_point():
        raise PluginError(f"{where}: probs.values must be a floating tensor [M, draft vocabulary]")
    width = vocab_size if probs.token_ids is None else len(probs.token_ids)
    if values.shape[1] != width:
        raise PluginError(f"{where}: probs.values has width {values.shape[1]}, expected {width}")
    index = list(range(len(tokens))) if probs.index is None else [int(i) for i in probs.index]
    if len(index) != len(tokens) or any(not 0 <= i < len(values) for i in index):
        raise PluginError(f"{where}: probs.index must name one of {len(values)} rows for each of {len(tokens)} nodes")
    used = values[torch.tensor(index, device=values.device)]
    sums = used.sum(dim=-1)
    if not bool((used >= 0).all()) or not bool(((sums - 1).abs() < _SUM_TOLERANCE).all()):
        raise PluginError(
            f"{where}: probs.values holds rows that are no distributions (negative, NaN, or not summing to 1)"
        )
    drawn = torch.tensor(tokens, device=values.device)
    if probs.token_ids is not None:
        matches = probs.token_ids.to(values.device)[None, :] == drawn[:, None]
        if not bool(matches.any(dim=-1).all()):
            raise PluginError(f"{where}: a draft token is not among probs.token_ids")
        drawn = matches.int().argmax(dim=-1)
    if not bool((used.gather(1, drawn[:, None]) > 0).all()):
        raise PluginError(f"{where}: a draft token has probability 0 in the distribution it is said to be drawn from")
    by_parent: dict[int, int] = {}
    siblings: set[tuple[int, int]] = set()
    for node, row in enumerate(index):
        parent = node - 1 if parents is None else parents[node]
        if (parent, tokens[node]) in siblings:
            raise PluginError(
                f"{where}: node {node} repeats a sibling's token; sampled siblings are drawn without replacement"
            )
        siblings.add((parent, tokens[node]))
        if by_parent.setdefault(parent, row) != row:
            raise PluginError(f"{where}: the children of node {parent} name different rows of probs.values")
