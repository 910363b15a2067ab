"""What a host's batches are bounded by."""

from __future__ import annotations

import sys

import attrs

from specplug.errors import ConfigurationError
from specplug.values import integer


@attrs.frozen(kw_only=True)
class HostLimits:
    """The sizes of a host, and what it can do.

    Attributes:
        vocab_size: the width of the target's logits.
        max_model_len: the most tokens of a row, prompt and output.
        max_num_seqs: the most rows at a time.
        max_num_batched_tokens: the most tokens in one forward of the target, drafts included.
        num_layers: the target's decoder layers, if the host delivers target states; else 0.
        trees: whether it verifies draft trees; else each draft is cut to its best chain.
        max_draft_tokens: the most draft tokens of a row that it verifies, if speculators may propose more.
        block_size: tokens of a block of the speculators' own KV caches.
        memory_bytes: what speculators may use, weights and KV caches; None for as much as they plan.
    """

    vocab_size: int = attrs.field(**integer(1, ConfigurationError))
    max_model_len: int = attrs.field(**integer(1, ConfigurationError))
    max_num_seqs: int = attrs.field(default=1, **integer(1, ConfigurationError))
    max_num_batched_tokens: int = attrs.field(default=8192, **integer(1, ConfigurationError))
    num_layers: int = attrs.field(default=0, **integer(0, ConfigurationError))
    trees: bool = False
    max_draft_tokens: int | None = attrs.field(default=None, **integer(1, ConfigurationError, or_none=True))
    block_size: int = attrs.field(default=16, **integer(1, ConfigurationError))
    memory_bytes: int | None = attrs.field(default=None, **integer(1, ConfigurationError, or_none=True))

    @property
    def budget_bytes(self) -> int:
        """`memory_bytes`, or more than there is."""
        return sys.maxsize if self.memory_bytes is None else self.memory_bytes
