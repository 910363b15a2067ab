"""What a speculator declares, what `propose` and `verify` get, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import attrs

from specplug.values import as_integer, as_tuple, expect, flag, integer, is_integer

if TYPE_CHECKING:
    import torch

    from specplug.model.kv_cache import BlockTable
    from specplug.model.pending import UpcomingTokens
    from specplug.sampling.params import SamplingParams

EndReason = Literal["finished", "aborted", "preempted"]
"""Why a row left the batch. A preempted row comes back later, as a new row."""

Boundary = int | Literal["final"]
"""A point of the target's residual stream. b: the input of layer b; the number of layers: the last layer's output; "final":
after the final norm."""


class Speculator(Protocol):
    """What `load_speculator` returns: an object with a method `propose` that is marked with `@hookimpl`.

    The hooks `plan_memory`, `warmup` and `verify` are optional methods, and `traits` (`SpeculatorTraits`) is an optional
    attribute.
    """

    def propose(self, batch: ProposalBatch) -> Proposal | None:
        """Drafts for every row of the batch; see the [hook](#propose)."""
        ...


def _as_boundaries(value: Any) -> Any:
    several = as_tuple(value)
    return tuple(as_integer(each) for each in several) if isinstance(several, tuple) else several


def _are_boundaries(value: Any) -> bool:
    return isinstance(value, tuple) and all(each == "final" or is_integer(each, 0) for each in value)


@attrs.frozen
class SpeculatorTraits:
    """What a speculator declares in its optional attribute `traits`. What is not declared is not computed.

    Attributes:
        hidden_states: the boundaries whose target states it receives, at all new positions.
        top_k: how many of the target's most likely next tokens, with probabilities, it receives at all new positions.
        top_k_at_drafts: whether it also receives them at every node of a row's last draft, rejected nodes included: see
            `ProposalRow.drafted`. Needs `top_k`.
        token_only: whether the proposal is a function of `row.tokens` alone. Such a speculator may cache by `row.row_id`,
            receives no target states, is not called for rows with a budget of zero, and keeps its rows after a fault.
        max_nodes: the most nodes of a row's draft tree; None means `num_speculative_tokens`. It may be larger than that.
        max_depth: the depth of a row's draft tree; None means `num_speculative_tokens`.
        learns: whether proposals may depend on other requests, ended ones included: on their tokens and states, not on how
            they were scheduled. What it stores of them may grow. The conformance kit does not compare such a speculator with
            a fresh one, and benchmarks measure it on prompts that it has not seen. Excludes `token_only`.
        drafts_early: whether `propose` may be called before the host knows what verification accepted: then all rows have
            `upcoming` tokens. On a GPU this hides the host's work behind drafting. What it returns in such a call is None, or
            chains in a tensor, a list never. It must run the new tokens of every row, also of rows without a budget and of
            rows with a whole prompt: core does not show them again. Excludes `token_only`.

    Raises:
        ValueError: a value has the wrong type or range, or two values exclude each other.
    """

    hidden_states: tuple[Boundary, ...] = attrs.field(
        default=(),
        converter=_as_boundaries,
        validator=expect(_are_boundaries, "a tuple of boundaries, each 0 or more, or 'final'", ValueError),
    )
    top_k: int = attrs.field(default=0, **integer(0, ValueError))
    top_k_at_drafts: bool = attrs.field(default=False, **flag(ValueError), kw_only=True)
    token_only: bool = attrs.field(default=False, **flag(ValueError))
    max_nodes: int | None = attrs.field(default=None, **integer(1, ValueError, or_none=True))
    max_depth: int | None = attrs.field(default=None, **integer(1, ValueError, or_none=True))
    learns: bool = attrs.field(default=False, **flag(ValueError))
    drafts_early: bool = attrs.field(default=False, **flag(ValueError), kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.token_only and self.drafts_early:
            raise ValueError(
                "SpeculatorTraits: token_only=True and drafts_early=True: a proposal that is a function of the row's tokens "
                "needs to know them"
            )
        if self.token_only and self.learns:
            raise ValueError(
                "SpeculatorTraits: token_only=True and learns=True: a proposal that depends on other requests is not a "
                "function of the row's tokens"
            )
        if self.top_k_at_drafts and not self.top_k:
            raise ValueError("SpeculatorTraits: top_k_at_drafts=True without top_k: set top_k to the number of tokens")
        if self.token_only and self.needs_states:
            raise ValueError(
                "SpeculatorTraits: token_only=True with hidden_states or top_k: a proposal that depends on the target's "
                "states is not a function of the row's tokens; leave one of them out"
            )

    @property
    def needs_states(self) -> bool:
        """Whether the speculator receives anything of the target's forward."""
        return bool(self.hidden_states) or self.top_k > 0


class TokenView(Sequence[int]):
    """A read-only view of a row's committed token ids. It grows with the row; slices are copies, as lists."""

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
        min_probability: what `worth_extending` compares each row's chain with; 0 never stops one.
        min_surplus: what it compares all rows together with.
    """

    max_nodes: int
    max_depth: int
    min_probability: float = 0.0
    min_surplus: float = 0.0

    @property
    def may_stop(self) -> bool:
        """Whether `worth_extending` can answer False."""
        return self.min_probability > 0.0 or self.min_surplus > 0.0

    @staticmethod
    def worth_extending(budgets: Sequence[Budget], probabilities: Sequence[float | None]) -> list[bool]:
        """Which rows' chains to draft another token for: for speculators that draft token after token, all rows at once.

        A row's chain is extended where verifying the token costs less time than it is expected to save; and any are only if
        together they save more than drafting takes, which is about the same for one row and for many. The next token's
        probability is estimated from the chain: after a sure chain it is likely as well, after a doubtful one half as likely.
        Whoever stops for it gives `Proposal.scores`.

        Args:
            budgets: of the rows whose chains may be extended.
            probabilities: for each, that all tokens so far are accepted: the product of the probabilities that the speculator
                gave them. None where that is not known, as for sampled tokens: such a row goes on, and so do the others
                whose own token is worth it.

        Returns:
            For each row whether to draft another token.
        """
        if len(budgets) == 1 and probabilities[0] is not None:  # the usual case, once for every token
            return [_extended(probabilities[0]) >= budgets[0].min_probability + budgets[0].min_surplus]
        gains = [None if probability is None else _extended(probability) for probability in probabilities]
        extended = [gain is None or gain >= budget.min_probability for budget, gain in zip(budgets, gains, strict=True)]
        if None in gains:
            return extended
        surplus = sum(
            gain - budget.min_probability
            for budget, gain, own in zip(budgets, gains, extended, strict=True)
            if own and gain is not None
        )
        wanted = max((budget.min_surplus for budget in budgets), default=0.0)
        return extended if surplus >= wanted else [False] * len(extended)


def _extended(probability: float) -> float:
    """The estimated probability of a chain with one more token."""
    return probability * (0.5 + 0.5 * probability)


@attrs.frozen
class Outcome:
    """The result of a row's last proposal.

    Attributes:
        method: the method that proposed it.
        num_nodes: how many nodes were verified; core may have dropped some of those that were proposed.
        accepted: the accepted nodes from the root down, as indices of the verified nodes.
        tokens: the ids of the verified nodes.
    """

    method: str
    num_nodes: int
    accepted: tuple[int, ...]
    tokens: tuple[int, ...] = attrs.field(default=(), eq=False)


@attrs.define(eq=False)
class ProposalRow:
    """One sequence in `propose`.

    Attributes:
        row_id: a small number that identifies the row until `ended` reports it; then it may be given to another row. The key
            of per-row state.
        is_new: whether the speculator sees this row for the first time; discard what is stored under its `row_id`.
        tokens: all committed ids, prompt included. The last one has no target state yet. The view stays valid after the
            call; when the row is reported in `ended`, it holds the row's final tokens.
        num_prompt_tokens: how many of `tokens` are the prompt.
        new_positions: the positions whose target states became final since the last call for this row: a row's calls cover
            every position once, in order. It is empty if nothing is new. It may start after 0 for a new row: a fork, a row that
            the prefix cache knows, or a row whose older states are no longer stored.
        new_states: the part of the batch's state tensors that belongs to this row, one entry per position of
            `new_positions`: `batch.hidden_states["final"][row.new_states]`. Empty if no states are declared.
        budget: the most it may draft.
        sampling: the request's sampling parameters.
        outcome: the result of the speculator's own last proposal for the row, if it was verified since the last call; else
            that of another speculator's proposal in the last step; None if there was neither.
        drafted: the part of `drafted_top_ids` and `drafted_top_probs` that belongs to the nodes of `outcome`, for a
            speculator that declares `top_k_at_drafts`. Empty if that draft was not verified in the last step.
        table: the row's block table, for KV regions with `tables="shared"`; None in a host without a paged cache. KV slots
            are reserved for `new_positions`, and where the budget is not zero for all committed tokens plus the planned
            `scratch_tokens_per_row`.
        forked_from: for a new row that is a fork, the `row_id` of its parent, if the parent is still running. KV regions with
            `tables="shared"` then hold the parent's entries for the positions before `new_positions`.
        num_cached_tokens: for a new row, how many of its first positions have this speculator's own entries in KV regions with
            `tables="shared"`, from earlier rows with the same tokens: all before `new_positions`, or 0.
        upcoming: for a speculator that declares `drafts_early`: tokens after `tokens` that verification has decided and the
            host does not know yet, at least one; None if all are known. The draft's root is then the last of those that come.
            `new_positions` and `new_states` are as if all came: `new_positions.stop == len(tokens) + len(upcoming) - 1`. KV
            slots are reserved for all of them and the scratch, whatever the budget. The next call's `new_positions` begin
            after those that came. `outcome` is None. For a loop of `Resources.compile_loop`, put `upcoming.placeholders` at
            the end of a `ForwardRow`'s tokens, and `upcoming` into it. Anything else needs `upcoming.read()`, which waits
            for the ids.
    """

    row_id: int
    is_new: bool
    tokens: TokenView
    new_positions: range
    budget: Budget
    sampling: SamplingParams
    new_states: slice = slice(0, 0)
    outcome: Outcome | None = None
    table: BlockTable | None = None
    forked_from: int | None = None
    num_prompt_tokens: int = 0
    drafted: slice = slice(0, 0)
    num_cached_tokens: int = 0
    upcoming: UpcomingTokens | None = None
    _generator: Callable[[], torch.Generator] | None = None

    @property
    def gains_by_sampling(self) -> bool:
        """Whether sampled drafts, with their distributions reported, are accepted more often than argmax drafts.

        They are not at temperature 0, where one token is right, nor for a seeded row, which is verified by sampling from the
        target and comparing.
        """
        return not self.sampling.greedy and self.sampling.seed is None

    @property
    def generator(self) -> torch.Generator:
        """The row's random stream for drafting, on the engine's device. Verification uses other streams."""
        if self._generator is None:
            raise RuntimeError("this row was made without a random stream")
        return self._generator()


@attrs.define(eq=False)
class ProposalBatch:
    """The rows of one `propose` call. Tensors are valid only during the call.

    N is the number of all rows' new positions, M that of all rows' `drafted` nodes; rows are concatenated in order.

    Attributes:
        rows: the rows to ingest and draft for.
        ended: (row_id, reason) of rows that finished, were aborted or were preempted. Handle them before `rows`: a new row
            may have the same `row_id`.
        hidden_states: for each declared boundary, [N, hidden] in the target's dtype.
        top_ids: int64 [N, top_k], the target's most likely next tokens after each new position, or None.
        top_probs: float32 [N, top_k], their probabilities under the unmodified softmax, or None.
        drafted_top_ids: int64 [M, top_k], the same after each node of the drafts that the last step verified, accepted or
            not; None unless the speculator declares `top_k_at_drafts`.
        drafted_top_probs: float32 [M, top_k], their probabilities, or None.
        uses_scores: whether `Proposal.scores` have a use. On a GPU they have one only where drafts are limited for all rows
            together, or a request is traced: elsewhere waiting for them costs more than they bring. A speculator there then
            leaves them out, and gives its tokens as a tensor on the GPU.
    """

    rows: list[ProposalRow]
    ended: list[tuple[int, EndReason]] = attrs.field(factory=list)
    hidden_states: Mapping[Boundary, torch.Tensor] = attrs.field(factory=dict)
    top_ids: torch.Tensor | None = None
    top_probs: torch.Tensor | None = None
    drafted_top_ids: torch.Tensor | None = None
    drafted_top_probs: torch.Tensor | None = None
    uses_scores: bool = True


@attrs.define(eq=False)
class DraftDistributions:
    """The distributions from which a row's nodes were sampled. Tensors may also be numpy arrays.

    Attributes:
        values: float32 [M, draft vocabulary]: the normalised distributions that were sampled from, temperature and
            truncation included.
        index: for each node, the row of `values` that it was sampled from. Siblings share a row: they were sampled without
            replacement, in node order. None: node i was sampled from row i.
        token_ids: int64 [draft vocabulary]: the target id of each draft id. None: draft ids are target ids.
    """

    values: torch.Tensor
    index: Sequence[int] | None = None
    token_ids: torch.Tensor | None = None


@attrs.define(eq=False)
class Proposal:
    """Draft tokens for every row of a batch, in its order. An empty draft is always legal.

    A row's draft is a chain, or with `parents` a tree. The root, which is the last committed token, is not a node.

    A draft without `probs` is *deterministic*: it does not depend on the row's verification randomness, and lossless
    verification needs nothing else. A draft with `probs` was *sampled*; rejection sampling verifies it. Whether a node is
    left out may depend only on what was known before it was sampled, never on the sampled token.

    Integers may be those of numpy; a row's ids, parents and scores may be arrays or tensors.

    Attributes:
        tokens: per row the target ids of its nodes; or an integer tensor [rows, K], alone or with `lengths`. A tensor without
            elements may have any dtype. Chains in a tensor on the target's GPU, without scores and probs, stay there: the next
            forward starts before the host has seen them.
        parents: per row, None for a chain, or for each node the index of its parent, -1 for the root. Parents come before
            their children. Tokens `[a, b, c]` with parents `[-1, 0, 0]`: a follows the root, b and c are children of a.
        scores: per row, None or a score for each node of a deterministic draft, non-increasing along a path. In a large batch
            core keeps the nodes with the best scores of all rows together. Use cumulative log-probabilities, in nats.
        probs: per row, None or the distributions from which the nodes were sampled.
        lengths: the number of valid nodes of each row, for rows that are padded to one length. It applies to parents and
            scores too.
    """

    tokens: Sequence[Sequence[int]] | torch.Tensor
    parents: Sequence[Sequence[int] | None] | None = None
    scores: Sequence[Sequence[float] | None] | None = None
    probs: Sequence[DraftDistributions | None] | None = None
    lengths: Sequence[int] | None = None
