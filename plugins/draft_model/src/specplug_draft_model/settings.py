"""The keys of the `draft_model` method."""

from __future__ import annotations

from typing import Literal

import attrs

SampleMethod = Literal["greedy", "probabilistic"]
SAMPLE_METHODS: tuple[SampleMethod, ...] = ("greedy", "probabilistic")


@attrs.frozen
class DraftModelSettings:
    """The keys of the method, with vLLM's names where vLLM has them.

    Attributes:
        model: a folder or hub name; `tiny` is the draft that comes with this package, for the embedded target `tiny`.
        revision: of a hub name.
        dtype: a dtype's name, or `auto` for the checkpoint's own; None takes the target's.
        device: where the draft runs; None takes the target's.
        max_model_len: sequences longer than this go on without drafts; None takes the draft's own context.
        draft_sample_method: `greedy` drafts the most likely token; `probabilistic`, which accepts more, samples with the
            request's own temperature and truncation. A request at temperature 0 or with a seed is drafted for greedily with
            either.
        draft_confidence_threshold: a row stops drafting where the draft's most likely token has less than this
            probability; 0 never stops.
        use_heterogeneous_vocab: accepted because vLLM has it. Whether the vocabularies differ is seen from the tokenizers.
    """

    model: str | None = None
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    max_model_len: int | None = None
    draft_sample_method: str = "probabilistic"
    draft_confidence_threshold: float = 0.0
    use_heterogeneous_vocab: bool = False

    def __attrs_post_init__(self) -> None:
        if self.draft_sample_method not in SAMPLE_METHODS:
            raise ValueError(
                f"draft_sample_method={self.draft_sample_method!r}: expected one of {', '.join(SAMPLE_METHODS)}"
            )
        if not 0.0 <= self.draft_confidence_threshold < 1.0:
            raise ValueError(
                f"draft_confidence_threshold={self.draft_confidence_threshold}: expected a probability, at least 0 and below 1"
            )
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"max_model_len={self.max_model_len}: expected an integer of at least 1")
