"""What a step did for a traced request: its draft, what became of it, and what plain decoding would have taken."""

from __future__ import annotations

import attrs


@attrs.frozen
class TracedNode:
    """One node of a verified draft.

    Attributes:
        token: its id.
        parent: the index of its parent; -1 for the root, which is the last token before the step.
        draft_prob: the probability that its speculator gave it after its parent; None where the speculator does not say.
        target_prob: the target's, before sampling parameters.
        accepted: whether it was accepted.
    """

    token: int
    parent: int
    draft_prob: float | None
    target_prob: float
    accepted: bool


@attrs.define(eq=False)
class StepTrace:
    """What one step did for one traced request.

    Attributes:
        tokens: the committed ids.
        probs: the target's probability of each, before sampling parameters.
        sources: for each the method that drafted it; None for the target's own.
        method: who drafted; None if there was no draft.
        nodes: of the draft, parents before children.
        is_tree: whether the draft was a tree, not a chain.
        num_prompt_tokens: how many tokens of the prompt (or of a preempted sequence) the step computed.
        num_rows: how many sequences it advanced.
        seconds: what it took, the speculators' next proposals included.
        propose_seconds: what these took.
        plain_seconds: what plain decoding of the same batch would have taken for as many tokens; None if that is not known.
    """

    tokens: list[int]
    probs: list[float]
    sources: list[str | None]
    method: str | None
    nodes: list[TracedNode]
    is_tree: bool
    num_prompt_tokens: int
    num_rows: int = 0
    seconds: float = 0.0
    propose_seconds: float = 0.0
    plain_seconds: float | None = None
