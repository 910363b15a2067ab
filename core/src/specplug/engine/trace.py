"""Traces what steps do for the requests that ask for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import torch

from specplug.engine.target_step import TargetStep
from specplug.model.device import to_device
from specplug.request import StepOutput
from specplug.speculation.adaptive.cost_model import target_costs
from specplug.speculation.adaptive.settings import AdaptiveSettings
from specplug.speculation.draft import Draft
from specplug.speculation.draft_length import DraftLengthPolicy
from specplug.trace import StepTrace, TracedNode


class Tracer:
    """Traces the requests of one engine that ask for it. Nothing is called for others.

    Args:
        policy: whose costs of a step are used, if it has learned them; else traced steps without drafts are timed.

    Attributes:
        open: the traces of the current step, to be completed at its end.
    """

    def __init__(self, policy: DraftLengthPolicy) -> None:
        self._policy = policy
        self._measured = target_costs(AdaptiveSettings())
        self.open: list[StepTrace] = []

    def record(
        self, output: StepOutput, draft: Draft | None, path: Sequence[int], logits: torch.Tensor, num_pending: int
    ) -> StepOutput:
        """Adds a trace to what a step committed for a traced request.

        Args:
            output: what it committed.
            draft: the draft that it verified.
            path: the accepted nodes.
            logits: [1 + nodes, vocabulary]: after the root, and after each node.
            num_pending: how many committed tokens the step computed.
        """
        if output.request.error is not None:
            return output
        try:
            trace = _trace(output, draft, path, logits, num_pending)
        except Exception as error:  # for example, too little memory for the probabilities
            output.request.fail(error)
            return output
        self.open.append(trace)
        return attrs.evolve(output, trace=trace)

    def end_step(self, step: TargetStep, decoding: bool, target_seconds: float, seconds: float) -> None:
        """Completes the traces of a step.

        Args:
            step: its target forward.
            decoding: whether every row ran one pending token and nothing other than its draft.
            target_seconds: what it took until its tokens were known.
            seconds: what it took, the next proposals included.
        """
        num_rows, num_nodes = len(step.rows), step.offsets[-1] - len(step.requests)
        traces, self.open = self.open, []
        if decoding and not num_nodes:
            self._measured.observe(num_rows, 0, target_seconds)
        for trace in traces:
            trace.num_rows = num_rows
            trace.seconds = seconds
            trace.propose_seconds = seconds - target_seconds
            if not num_nodes:
                trace.plain_seconds = target_seconds
            elif decoding and (each := self._plain_step(num_rows)) is not None:
                trace.plain_seconds = each * len(trace.tokens)

    def abandon(self) -> None:
        """Forgets the traces of an interrupted step."""
        self.open = []

    def _plain_step(self, num_rows: int) -> float | None:
        """The expected seconds of a step of so many rows without drafts."""
        expected = self._policy.plain_seconds(num_rows)
        if expected is None and (curve := self._measured.of(num_rows)) is not None:
            expected = curve.seconds(0)
        return expected


def _trace(
    output: StepOutput, draft: Draft | None, path: Sequence[int], logits: torch.Tensor, num_pending: int
) -> StepTrace:
    """See `Tracer.record`."""
    tokens = output.new_tokens
    nodes = [] if draft is None else draft.tokens
    parents = [] if draft is None else draft.parent_list()
    entries = [*(parent + 1 for parent in parents), 0, *(node + 1 for node in path)][: len(nodes) + len(tokens)]
    probs = _probs(logits, entries, [*nodes, *tokens])
    accepted = set(path[: len(tokens)])
    guesses = [None] * len(nodes) if draft is None else _draft_probs(draft)
    return StepTrace(
        tokens=tokens,
        probs=probs[len(nodes) :],
        sources=output.sources,
        method=None if draft is None else draft.method,
        nodes=[
            TracedNode(token, parent, guess, prob, node in accepted)
            for node, (token, parent, guess, prob) in enumerate(
                zip(nodes, parents, guesses, probs[: len(nodes)], strict=True)
            )
        ],
        is_tree=draft is not None and draft.parents is not None,
        num_prompt_tokens=0 if num_pending == 1 else num_pending,
    )


def _probs(logits: torch.Tensor, entries: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """The probability of a token at each of the given entries."""
    rows, columns = to_device(list(entries), logits.device), to_device(list(tokens), logits.device)
    values = logits.float()
    chosen: list[float] = (values[rows, columns] - values.logsumexp(dim=-1)[rows]).exp().tolist()
    return chosen


def _draft_probs(draft: Draft) -> list[float | None]:
    """The probability that the speculator gave to each node after its parent, where it told."""
    probs, scores = draft.probs, draft.scores
    if probs is not None:
        values = torch.as_tensor(probs.values)
        columns = to_device(draft.tokens, values.device)
        if probs.token_ids is not None:
            known = torch.as_tensor(probs.token_ids, device=values.device)
            columns = (known[None, :] == columns[:, None]).int().argmax(dim=-1)
        rows = to_device(list(probs.index or range(len(draft))), values.device)
        return [float(value) for value in values[rows, columns].tolist()]
    if scores is not None:  # cumulative log-probabilities
        before = [0.0 if parent < 0 else scores[parent] for parent in draft.parent_list()]
        return [math.exp(min(0.0, own - base)) for own, base in zip(scores, before, strict=True)]
    return [None] * len(draft)
