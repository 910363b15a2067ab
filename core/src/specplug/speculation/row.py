"""What the chain of speculators uses of a running sequence: a `Request` has it, and so have rows of other engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from specplug.contract.types import Outcome, TokenView
from specplug.sampling.params import SamplingParams
from specplug.speculation.draft import Draft

if TYPE_CHECKING:
    import torch

    from specplug.model.kv_cache import BlockTable


class DraftRandomness(Protocol):
    """The random streams of a row, of which drafting needs one."""

    def draft_generator(self) -> torch.Generator:
        """The row's generator for drafting."""


class Row(Protocol):
    """One running sequence; see `specplug.request.Request` for the meaning of the attributes."""

    num_prompt_tokens: int
    params: SamplingParams
    draft: Draft | None
    outcome: Outcome | None
    stored_by: dict[int, int]

    @property
    def number(self) -> int: ...  # noqa: D102
    @property
    def slot(self) -> int: ...  # noqa: D102
    @property
    def tokens(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def view(self) -> TokenView: ...  # noqa: D102
    @property
    def num_computed(self) -> int: ...  # noqa: D102
    @property
    def num_pending(self) -> int: ...  # noqa: D102
    @property
    def num_output_tokens(self) -> int: ...  # noqa: D102
    @property
    def table(self) -> BlockTable | None: ...  # noqa: D102
    @property
    def forked_from(self) -> int | None: ...  # noqa: D102
    @property
    def num_forked_tokens(self) -> int: ...  # noqa: D102
    @property
    def is_traced(self) -> bool: ...  # noqa: D102
    @property
    def randomness(self) -> DraftRandomness: ...  # noqa: D102


Reserve = Callable[[Row, int], bool]
"""`(row, tokens) -> bool`: grows a row's KV blocks to so many tokens, if there are any left."""
