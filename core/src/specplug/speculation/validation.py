"""Checks proposals against the contract."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from specplug.contract.types import Budget, DraftDistributions, Proposal
from specplug.errors import PluginError
from specplug.model.pending import PendingTokens
from specplug.speculation.draft import Draft, depths_of
from specplug.speculation.reported_probs import ReportedProbs, check_probs, check_values
from specplug.values import as_integer, is_integer, shown


def check_proposal(
    proposal: Proposal | None,
    budgets: Sequence[Budget],
    method: str,
    vocab_size: int,
    pending: PendingTokens | None = None,
) -> list[Draft | None]:
    """Turns a proposal into one checked draft per row (None: no draft).

    Args:
        proposal: what `propose` returned.
        budgets: of the rows.
        method: who proposed.
        vocab_size: of the target.
        pending: takes ids that may stay on the device. They are checked when the host reads them.

    Raises:
        PluginError: the proposal breaks the contract; the message says where.
    """
    if proposal is None:
        return [None] * len(budgets)
    if not isinstance(proposal, Proposal):
        raise PluginError(f"propose returned {type(proposal).__name__}, expected a Proposal or None")
    rows: Any = proposal.tokens if _may_stay(proposal, pending) else _token_lists(proposal)
    if len(rows) != len(budgets):
        raise PluginError(f"propose returned {len(rows)} rows for a batch of {len(budgets)}")
    if isinstance(rows, torch.Tensor):
        assert pending is not None
        return _pending_drafts(rows, lengths_of(proposal, rows), budgets, method, pending)
    for name in ("parents", "scores", "probs"):
        values = getattr(proposal, name)
        if values is not None and _count(values, f"proposal.{name}") != len(rows):
            raise PluginError(f"proposal.{name} has {len(values)} rows for a batch of {len(rows)}")
    drafts: list[Draft | None] = []
    reported: list[ReportedProbs] = []
    for row, (tokens, budget) in enumerate(zip(rows, budgets, strict=True)):
        where = f"row {row}"
        if not isinstance(tokens, list):
            raise PluginError(f"{where}: draft tokens {shown(tokens)}: expected a list of ids")
        if not tokens:
            drafts.append(None)
            continue
        parents = None if proposal.parents is None else proposal.parents[row]
        scores = None if proposal.scores is None else proposal.scores[row]
        probs = None if proposal.probs is None else proposal.probs[row]
        if proposal.lengths is not None:
            parents = None if parents is None else parents[: len(tokens)]
            scores = None if scores is None else scores[: len(tokens)]
        _check_tokens(tokens, budget, vocab_size, where)
        parent_list = _check_parents(parents, tokens, budget, where)
        score_list = _check_scores(scores, parent_list, tokens, where)
        if probs is not None:
            if score_list is not None:
                raise PluginError(f"{where}: scores are for deterministic trees; this row has probs")
            probs = _as_tensors(probs, where)
            reported.append(check_probs(probs, tokens, parent_list, vocab_size, where))
        drafts.append(Draft(method, tokens, parent_list, score_list, probs))
    if reported:
        check_values(reported, vocab_size)
    return drafts


def _token_lists(proposal: Proposal) -> list[list[int]]:
    """A new list of ids for every row."""
    tokens: Any = proposal.tokens
    if hasattr(tokens, "tolist"):  # a tensor, or an array
        if 0 in tokens.shape:  # an empty tensor's dtype and width have no meaning
            rows: list[list[int]] = [[] for _ in range(len(tokens))]
        else:
            rows = tokens.tolist()
            if tokens.ndim != 2 or type(rows[0][0]) is not int:
                raise PluginError(
                    f"proposal.tokens has shape {tuple(tokens.shape)} and dtype {tokens.dtype}, expected integers [rows, K]"
                )
    else:
        try:
            rows = [row.tolist() if hasattr(row, "tolist") else list(row) for row in tokens]
        except TypeError:
            raise PluginError(f"proposal.tokens={shown(tokens)}: expected a list of ids for each row") from None
    if proposal.lengths is None:
        return rows
    return [row[:length] for row, length in zip(rows, lengths_of(proposal, rows), strict=True)]


def lengths_of(proposal: Proposal, rows: Any) -> list[int]:
    """How many ids of each row count."""
    widths = [rows.shape[1]] * len(rows) if isinstance(rows, torch.Tensor) else [len(row) for row in rows]
    if proposal.lengths is None:
        return widths
    lengths = _integers(proposal.lengths, "proposal.lengths")
    if len(lengths) != len(rows):
        raise PluginError(f"proposal.lengths has {len(lengths)} entries for {len(rows)} rows of tokens")
    for row, length in enumerate(lengths):
        if not 0 <= length <= widths[row]:
            raise PluginError(f"row {row}: proposal.lengths is {length}, and proposal.tokens has {widths[row]}")
    return lengths


def _may_stay(proposal: Proposal, pending: PendingTokens | None) -> bool:
    """Whether nothing about a proposal needs its ids on the host."""
    return (
        pending is not None
        and isinstance(proposal.tokens, torch.Tensor)
        and pending.takes(proposal.tokens)
        and proposal.parents is None
        and proposal.scores is None
        and proposal.probs is None
    )


def _pending_drafts(
    tokens: torch.Tensor, lengths: Sequence[int], budgets: Sequence[Budget], method: str, pending: PendingTokens
) -> list[Draft | None]:
    """Chains whose ids stay on the device."""
    for row, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
        if length > min(budget.max_nodes, budget.max_depth):
            raise PluginError(
                f"row {row}: a chain of {length} tokens, the budget is {budget.max_nodes}, {budget.max_depth} deep"
            )
    return [Draft(method, row) if len(row) else None for row in pending.put(tokens, lengths)]


def _count(values: Any, where: str) -> int:
    try:
        return len(values)
    except TypeError:
        raise PluginError(f"{where}={shown(values)}: expected an entry for each row") from None


def _integers(values: Any, where: str) -> list[int]:
    """Integers of any library → ints.

    Raises:
        PluginError: a value is not an integer.
    """
    listed = values.tolist() if hasattr(values, "tolist") else values
    try:
        listed = list(listed)
    except TypeError:
        raise PluginError(f"{where}={shown(values)}: expected a list of integers") from None
    for place, value in enumerate(listed):
        if type(value) is not int:
            listed[place] = as_integer(value)
            if not is_integer(listed[place]):
                raise PluginError(f"{where}: {shown(value)} is not an integer")
    return listed


def _check_tokens(tokens: list[int], budget: Budget, vocab_size: int, where: str) -> None:
    """Checks the ids, and converts those of other libraries to ints, in place."""
    if len(tokens) > budget.max_nodes:
        raise PluginError(f"{where}: {len(tokens)} draft tokens, the budget is {budget.max_nodes}")
    for node, token in enumerate(tokens):
        if type(token) is int and 0 <= token < vocab_size:
            continue
        tokens[node] = as_integer(token)
        if not is_integer(tokens[node], 0) or tokens[node] >= vocab_size:
            raise PluginError(
                f"{where}: draft token {shown(token)} is not an id of the target's vocabulary of {vocab_size}"
            )


def _check_parents(parents: Sequence[int] | None, tokens: list[int], budget: Budget, where: str) -> list[int] | None:
    if parents is None:
        if len(tokens) > budget.max_depth:
            raise PluginError(f"{where}: a chain of {len(tokens)} tokens, the deepest allowed is {budget.max_depth}")
        return None
    listed = _integers(parents, f"{where}: parents")
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
    try:
        listed = [float(score) for score in scores]
    except (TypeError, ValueError):
        raise PluginError(f"{where}: scores={shown(scores)}: expected a number for each node") from None
    if len(listed) != len(tokens):
        raise PluginError(f"{where}: {len(listed)} scores for {len(tokens)} draft tokens")
    for node, score in enumerate(listed):
        parent = node - 1 if parents is None else parents[node]
        if not math.isfinite(score):
            raise PluginError(f"{where}: node {node} has the score {score}")
        if parent >= 0 and score > listed[parent]:
            raise PluginError(f"{where}: node {node} scores higher than its parent {parent}")
    return listed


def _as_tensors(probs: Any, where: str) -> DraftDistributions:
    """The distributions with arrays converted to tensors, and the index to a list."""
    if not isinstance(probs, DraftDistributions):
        raise PluginError(f"{where}: probs are {type(probs).__name__}, expected DraftDistributions")
    if isinstance(probs.values, torch.Tensor) and probs.index is None and probs.token_ids is None:
        return probs
    values, token_ids = _as_tensor(probs.values), _as_tensor(probs.token_ids)
    index = None if probs.index is None else _integers(probs.index, f"{where}: probs.index")
    if token_ids is not None:
        if not isinstance(token_ids, torch.Tensor) or token_ids.dim() != 1 or not _holds_integers(token_ids):
            raise PluginError(f"{where}: probs.token_ids must be an integer tensor [draft vocabulary]")
        token_ids = token_ids.long()
    return DraftDistributions(values, index, token_ids)


def _as_tensor(value: Any) -> Any:
    """An array → a tensor; anything else unchanged."""
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _holds_integers(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
