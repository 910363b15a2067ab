"""What travels into `propose` and `verify`: rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, overload

import attrs

if TYPE_CHECKING:
    import torch

    from specplug.contract.traits import Boundary
    from specplug.model.kv_cache import BlockTable
    from specplug.sampling.params import SamplingParams
    from specplug.sampling.randomness import RowRandomness

EndReason = Literal["finished", "aborted", "preempted"]


class TokenView(Sequence[int]):
    """A read-only, live view of a row's committed token ids. Slices are fresh lists."""

    __slots__ = ("_tokens",)

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._tokens[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens)

    def __repr__(self) -> str:
        return f"TokenView({self._tokens!r})"


@attrs.frozen
class Budget:
    """The most a row may draft in this step. Zero nodes: bring your state up to date, propose nothing.

    A chain as long as `max_nodes` is also no deeper than `max_depth`, unless the speculator declares a `max_nodes` of its own.

    Attributes:
        max_nodes: draft tokens of the row.
        max_depth: draft tokens on one path from the root.
        least_chance: a hint for speculators that draft token after token and know how likely each is: a token of a
            deterministic chain that is less likely than this to be accepted, with all before it, costs more to verify than it
            is expected to save. Whoever stops for it gives `Proposal.scores`. 0 never stops. `worth_another_token` applies
            this and the next.
        least_sum: how much more than that the chances of all rows that go on must come to, for drafting to pay as well.
    """

    max_nodes: int
    max_depth: int
    least_chance: float = 0.0
    least_sum: float = 0.0

    @property
    def may_stop(self) -> bool:
        """Whether it names chances."""
        return self.least_chance > 0.0 or self.least_sum > 0.0


@attrs.frozen
class Outcome:
    """What became of a row's last proposal.

    Attributes:
        method: who proposed it.
        num_nodes: how many nodes were verified.
        accepted: the node indices that were kept, from the root down; indices count the nodes that were verified.
        tokens: the ids of the nodes that were verified; core may have cut some of those that were proposed.
    """

    method: str
    num_nodes: int
    accepted: tuple[int, ...]
    tokens: tuple[int, ...] = attrs.field(default=(), eq=False)


@attrs.define(eq=False)
class ProposalRow:
    """One sequence in `propose`. Every position is shown once, in order.

    Attributes:
        slot: a small number that names the row until it ends; use it as the key of your per-row state.
        is_new: the first time you see the row behind this slot; drop whatever you kept under it.
        tokens: all committed ids, prompt included; the last one has no target state yet. The view stays valid after the
            call: when you are told that the row ended, it holds the row's final tokens.
        num_prompt_tokens: how many of `tokens` are the prompt.
        computed: the positions whose target state became final since you last saw the row. It may start after 0 for a
            new row (a fork, or a row that slept longer than states were kept): such a row begins there.
        states: where this row's entries lie in the batch's state tensors: one per position of `computed`.
        budget: the most you may draft.
        sampling: the request's sampling parameters.
        outcome: what became of your own last proposal for the row, if it was verified since you last saw the row; else of
            another speculator's in the last step; None if there was neither.
        drafted: where the entries of the nodes of `outcome` lie in `drafted_top_ids` and `drafted_top_probs`, in their
            order, for a speculator that declares `top_k_at_drafts`. Empty where that draft was not verified in the last
            step: what is not fetched right after a step is not kept.
        table: the row's blocks (None in a host without a paged cache), for KV regions with `tables="shared"`. Slots are
            reserved for `computed`, and where the budget is not zero for all committed tokens plus the planned
            `scratch_tokens_per_row`.
        forked_from: for a new row that begins as a fork, the slot it was forked from, if that row is still there: whatever
            was stored in KV regions with `tables="shared"` for the positions before `computed` is there.
    """

    slot: int
    is_new: bool
    tokens: TokenView
    computed: range
    budget: Budget
    sampling: SamplingParams
    states: slice = slice(0, 0)
    outcome: Outcome | None = None
    table: BlockTable | None = None
    forked_from: int | None = None
    num_prompt_tokens: int = 0
    drafted: slice = slice(0, 0)
    _generator: Callable[[], torch.Generator] | None = None

    @property
    def gains_by_sampling(self) -> bool:
        """Whether drafts that are drawn, and whose distribution is reported, are accepted oftener than the likeliest tokens.

        A row at temperature 0 has one right token. A seeded row is verified by sampling the target and comparing, whatever was
        proposed: there the likeliest token is the best guess too.
        """
        return not self.sampling.greedy and self.sampling.seed is None

    @property
    def generator(self) -> torch.Generator:
        """The row's own random stream for drafting, on the engine's device; independent of the verifier's."""
        if self._generator is None:
            raise RuntimeError("this row was made without a random stream")
        return self._generator()


@attrs.define(eq=False)
class ProposalBatch:
    """The rows of one `propose` call. Tensors are valid only during the call.

    Attributes:
        rows: the rows to update and draft for.
        ended: (slot, reason) of rows that finished, were aborted or preempted; handle them before `rows`, whose new
            rows may reuse the slots.
        hidden_states: for each declared boundary, [N, hidden] in the target's dtype, rows concatenated in order.
        top_ids: int64 [N, top_k], the target's most likely next tokens at each computed position, or None.
        top_probs: float32 [N, top_k], their probabilities under the unmodified softmax, or None.
        drafted_top_ids: int64 [M, top_k], the same behind every node of the drafts that the last step verified, accepted or
            not; for a speculator that declares `top_k_at_drafts`, else None.
        drafted_top_probs: float32 [M, top_k], their probabilities, or None.
    """

    rows: list[ProposalRow]
    ended: list[tuple[int, EndReason]] = attrs.field(factory=list)
    hidden_states: Mapping[Boundary, torch.Tensor] = attrs.field(factory=dict)
    top_ids: torch.Tensor | None = None
    top_probs: torch.Tensor | None = None
    drafted_top_ids: torch.Tensor | None = None
    drafted_top_probs: torch.Tensor | None = None


@attrs.define(eq=False)
class VerificationRow:
    """One sequence in `verify`.

    Attributes:
        slot: the row's number.
        method: who drafted for it; None if nobody did.
        tokens: all committed ids; the last one is the root of the draft tree.
        num_prompt_tokens: how many of `tokens` are the prompt.
        sampling: the request's sampling parameters.
        randomness: the row's random streams; never shared between drafting, acceptance and residual sampling.
    """

    slot: int
    method: str | None
    tokens: TokenView
    num_prompt_tokens: int
    sampling: SamplingParams
    randomness: RowRandomness

    @property
    def output_index(self) -> int:
        """The index, in the output, of the next token."""
        return len(self.tokens) - self.num_prompt_tokens


@attrs.define(eq=False)
class VerificationBatch:
    """The rows of one `verify` call.

    Attributes:
        rows: all rows that produce a token in this step, with drafts or without.
    """

    rows: list[VerificationRow]
