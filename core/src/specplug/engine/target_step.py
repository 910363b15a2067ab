"""The target forward of one step: the tokens that run, the positions that need logits, and the results."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from specplug.engine.scheduler import ScheduledRow
from specplug.model.device import to_device
from specplug.model.rows import ForwardRow, TreeMask
from specplug.model.runner import ModelRunner
from specplug.request import Request
from specplug.sampling.distributions import top_probs
from specplug.speculation.target_states.ring_buffer import Captured, Channel
from specplug.speculation.target_states.store import TOP_IDS, TOP_PROBS, TargetStateStore


@attrs.frozen(eq=False)
class TargetStep:
    """A target forward over the scheduled rows.

    Attributes:
        rows: the scheduled rows.
        first: for each row, the packed index of its first token.
        requests: those that produce a token in this step, in row order.
        offsets: for each of `requests`, its first entry in the logits; one more at the end.
        logits: [entries, vocabulary]; entries of scored prompt positions come last.
        scored: (request, entry of its first scored prompt position, positions), if prompt log-probabilities were requested.
        captured: the states that speculators declared, over the packed batch.
    """

    rows: list[ScheduledRow]
    first: list[int]
    requests: list[Request]
    offsets: list[int]
    logits: torch.Tensor
    scored: list[tuple[Request, int, int]]
    captured: Captured


def run_target(runner: ModelRunner, states: TargetStateStore, rows: list[ScheduledRow]) -> TargetStep:
    """Runs the pending tokens and the draft of every row. Logits are computed only where they are needed."""
    forward_rows: list[ForwardRow] = []
    first: list[int] = []
    requests: list[Request] = []
    offsets = [0]
    logits_index: list[int] = []
    packed = 0
    for row in rows:
        forward_row = _forward_row(row)
        forward_rows.append(forward_row)
        first.append(packed)
        if row.samples:
            requests.append(row.request)
            logits_index.extend(range(packed + row.num_tokens - 1, packed + len(forward_row.tokens)))
            offsets.append(len(logits_index))
        packed += len(forward_row.tokens)
    scored = _add_scored_prompts(rows, first, logits_index)
    wants_top_k = TOP_IDS in states.specs
    logits = runner.forward(forward_rows, None if wants_top_k else logits_index, lasting=False)
    captured: dict[Channel, torch.Tensor] = {**runner.taps.captured}
    if wants_top_k:
        ids, probs = top_probs(logits, states.specs[TOP_IDS].width)
        captured |= {TOP_IDS: ids, TOP_PROBS: probs}
        logits = logits[to_device(logits_index or [0], logits.device)]
    return TargetStep(rows, first, requests, offsets, logits, scored, captured)


def _forward_row(row: ScheduledRow) -> ForwardRow:
    request = row.request
    assert request.table is not None
    start, draft = request.num_computed, request.draft
    tokens = request.tokens[start : start + row.num_tokens]
    if request.in_flight is not None:
        tokens.append(request.in_flight)
    tree = None
    if draft is not None:
        tokens += draft.input_ids
        if draft.parents is not None:
            tree = TreeMask.from_parents(start, draft.parents)
    held = 1 + (0 if draft is None else len(draft)) if row.samples else 0
    adapter = -1 if request.adapter is None else request.adapter.slot
    return ForwardRow(tokens, start, request.table, tree, slot=request.slot, held=held, adapter=adapter)


def _add_scored_prompts(
    rows: Sequence[ScheduledRow], first: Sequence[int], logits_index: list[int]
) -> list[tuple[Request, int, int]]:
    """Appends the prompt positions whose log-probabilities were requested to `logits_index`; see `TargetStep.scored`."""
    scored: list[tuple[Request, int, int]] = []
    for row, begin in zip(rows, first, strict=True):
        if missing := row.request.num_missing_prompt_logprobs:
            skipped = len(row.request.prompt_logprobs) - row.request.num_computed
            count = min(missing, row.num_tokens - skipped)
            if count <= 0:  # recomputed after a preemption
                continue
            scored.append((row.request, len(logits_index), count))
            logits_index.extend(range(begin + skipped, begin + skipped + count))
    return scored
