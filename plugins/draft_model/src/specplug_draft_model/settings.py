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
        model: a folder or hub name; `tiny` is the draft model in this package, for the embedded target `tiny`.
        revision: the revision of a hub name.
        dtype: a dtype's name, or `auto` for the checkpoint's own; None means the target's.
        device: the draft model's device; None means the target's.
        max_model_len: longer sequences get no drafts; None means the draft model's context length.
        draft_sample_method: `greedy` drafts argmax tokens. `probabilistic` samples with the request's temperature and
            truncation, and more of its drafts are accepted. Requests at temperature 0 or with a seed get argmax drafts with
            either.
        draft_confidence_threshold: a row stops when the draft model's most likely token has less than this probability; 0
            never stops.
        use_heterogeneous_vocab: accepted for compatibility with vLLM, and ignored: the tokenizers show whether vocabularies
            differ.
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
