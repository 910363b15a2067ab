"""Checks the distributions that a proposal reports for drafts that were sampled."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from specplug.contract.types import DraftDistributions
from specplug.errors import PluginError
from specplug.model.device import to_device

_SUM_TOLERANCE = 1e-3


@attrs.define(eq=False)
class ReportedProbs:
    """The reported distributions of one row, as the numeric checks need them.

    Attributes:
        where: the row, for messages.
        values: [M, draft vocabulary].
        index: each node's row of `values`.
        tokens: each node's token.
        vocabulary: the target ids of the columns; None where these are the ids themselves.
        columns: each node's column.
    """

    where: str
    values: torch.Tensor
    index: list[int]
    tokens: list[int]
    vocabulary: torch.Tensor | None
    columns: list[int]


def check_probs(
    probs: DraftDistributions, tokens: list[int], parents: list[int] | None, vocab_size: int, where: str
) -> ReportedProbs:
    """Checks the shapes and indices of one row's distributions; their values are left to `check_values`.

    Raises:
        PluginError: they do not fit the row's draft.
    """
    values = probs.values
    if not isinstance(values, torch.Tensor) or values.dim() != 2 or not values.is_floating_point():
        raise PluginError(f"{where}: probs.values must be a floating tensor [M, draft vocabulary]")
    width = vocab_size if probs.token_ids is None else len(probs.token_ids)
    if values.shape[1] != width:
        raise PluginError(f"{where}: probs.values has width {values.shape[1]}, expected {width}")
    index = list(range(len(tokens))) if probs.index is None else list(probs.index)
    if len(index) != len(tokens) or any(not 0 <= i < len(values) for i in index):
        raise PluginError(f"{where}: probs.index must name one of {len(values)} rows for each of {len(tokens)} nodes")
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
    return ReportedProbs(where, values, index, tokens, probs.token_ids, tokens)


def check_values(reported: Sequence[ReportedProbs], vocab_size: int) -> None:
    """Checks, for all rows together, what has to be read from the device.

    Raises:
        PluginError: an id is not of the target, a draft token not of the draft vocabulary, or a row not a distribution that
            allows its token.
    """
    _check_places(reported, vocab_size)
    _check_numbers(reported)


def _check_places(reported: Sequence[ReportedProbs], vocab_size: int) -> None:
    """Finds the drafts' columns in reduced vocabularies, with one read from the device for each vocabulary."""
    alike: dict[int, list[ReportedProbs]] = {}
    for entry in reported:
        if entry.vocabulary is not None:
            alike.setdefault(id(entry.vocabulary), []).append(entry)
    for entries in alike.values():
        vocabulary = entries[0].vocabulary
        assert vocabulary is not None
        tokens = to_device([token for entry in entries for token in entry.tokens], vocabulary.device)
        found = vocabulary[None, :] == tokens[:, None]
        bounds = torch.stack(vocabulary.aminmax())
        places = torch.cat([bounds, torch.where(found.any(dim=1), found.int().argmax(dim=1), -1)]).tolist()
        lowest, highest, *places = places
        if lowest < 0 or highest >= vocab_size:
            raise PluginError(
                f"{entries[0].where}: probs.token_ids go from {lowest} to {highest}, the target's vocabulary has {vocab_size}"
            )
        for entry in entries:
            entry.columns, places = places[: len(entry.tokens)], places[len(entry.tokens) :]
            if min(entry.columns) < 0:
                raise PluginError(f"{entry.where}: a draft token is not among probs.token_ids")


def _check_numbers(reported: Sequence[ReportedProbs]) -> None:
    """Checks, with one read from the device per width, that all reported rows are distributions that allow their token."""
    alike: dict[tuple[int, torch.device], list[ReportedProbs]] = {}
    for entry in reported:
        alike.setdefault((entry.values.shape[1], entry.values.device), []).append(entry)
    for entries in alike.values():
        used = _used(entries)
        columns = to_device([column for entry in entries for column in entry.columns], used.device)
        normal = (used.amin(dim=-1) >= 0) & ((used.sum(dim=-1) - 1).abs() < _SUM_TOLERANCE)
        possible = used.gather(1, columns[:, None])[:, 0] > 0
        if bool((normal & possible).all()):
            continue
        where = [entry.where for entry in entries for _ in entry.columns]
        if not bool(normal.all()):
            row = where[int((~normal).int().argmax())]
            raise PluginError(
                f"{row}: probs.values contains rows that are not probability distributions (negative, NaN, or not summing to 1)"
            )
        row = where[int((~possible).int().argmax())]
        raise PluginError(f"{row}: a draft token has probability 0 in the distribution it is said to be drawn from")


def _used(entries: Sequence[ReportedProbs]) -> torch.Tensor:
    """For every node of these rows, in order, what it was drawn from."""
    values: list[torch.Tensor] = []
    index: list[int] = []
    start = 0
    for entry in entries:
        values.append(entry.values)
        index += [start + row for row in entry.index]
        start += len(entry.values)
    together = torch.cat(values) if len(values) > 1 else values[0]
    return together if index == list(range(start)) else together[to_device(index, together.device)]
