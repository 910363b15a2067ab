"""The `suffix` method: a tree for each row, and one for the outputs of finished requests."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs

from specplug import Proposal, SpeculatorTraits, hookimpl
from specplug_suffix.candidates import Candidate, Drafter
from specplug_suffix.settings import SuffixSettings
from specplug_suffix.tree import SuffixTree

if TYPE_CHECKING:
    from specplug import ProposalBatch, ProposalRow, SpeculativeConfig, TargetModel, TokenView


@attrs.define(eq=False)
class Row:
    """The state of a row.

    Attributes:
        tokens: its committed ids, complete when it ends.
        num_prompt_tokens: how many of them are the prompt, which is not learnt.
        tree: the suffix tree of its prompt and output.
    """

    tokens: TokenView
    num_prompt_tokens: int
    tree: SuffixTree


@attrs.define(eq=False)
class SuffixSpeculator:
    """Drafts what most often followed the last tokens of a row, in the row itself or in earlier outputs.

    Its proposals depend on the requests that finished before.

    Attributes:
        settings: the user's settings.
        traits: its traits.
        rows: the running rows by row_id.
        finished: the suffix tree of the outputs of finished requests.
    """

    settings: SuffixSettings
    traits: SpeculatorTraits
    rows: dict[int, Row] = attrs.field(factory=dict, init=False, repr=False)
    finished: SuffixTree = attrs.field(init=False, repr=False)
    _drafter: Drafter = attrs.field(init=False, repr=False)
    _cached_tokens: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.finished = SuffixTree(self.settings.suffix_decoding_max_tree_depth)
        self._drafter = Drafter(self.settings)

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        """Learns from finished rows, forgets all ended ones, and drafts a tree for every row."""
        for row_id, reason in batch.ended:
            ended = self.rows.pop(row_id, None)
            if ended is not None and reason == "finished":
                self._learn(ended.tokens[ended.num_prompt_tokens :])
        drafts = [self._draft(row) for row in batch.rows]
        return Proposal(
            tokens=[draft.tokens for draft in drafts],
            parents=[None if _is_chain(draft.parents) else draft.parents for draft in drafts],
            scores=[[math.log(prob) for prob in draft.probs] for draft in drafts],
        )

    def _draft(self, row: ProposalRow) -> Candidate:
        known = self.rows.get(row.row_id)
        if known is None or row.is_new:
            tree = SuffixTree(self.settings.suffix_decoding_max_tree_depth)
            known = self.rows[row.row_id] = Row(row.tokens, row.num_prompt_tokens, tree)
        known.tokens = row.tokens
        known.tree.extend(row.tokens[len(known.tree.text) :])
        return self._drafter.draft(known.tree, self.finished, row.budget.max_nodes, row.budget.max_depth)

    def _learn(self, output: list[int]) -> None:
        tree, settings = self.finished, self.settings
        if not output or not settings.suffix_decoding_max_cached_requests:
            return
        if len(output) > settings.suffix_decoding_max_cached_tokens:
            return
        tree.extend(output)
        tree.finish()
        self._cached_tokens += len(output)
        while (
            len(tree.texts) > settings.suffix_decoding_max_cached_requests
            or self._cached_tokens > settings.suffix_decoding_max_cached_tokens
        ):
            self._cached_tokens -= tree.remove_oldest()


def _is_chain(parents: list[int]) -> bool:
    return all(parent == index - 1 for index, parent in enumerate(parents))


@hookimpl
def load_speculator(config: SpeculativeConfig, target: TargetModel) -> SuffixSpeculator:
    """Makes the speculator; see `SuffixSettings` for its keys.

    Raises:
        ConfigurationError: an unknown key or a wrong value.
    """
    settings = config.settings(SuffixSettings)
    most = config.num_speculative_tokens
    depth = min(most, settings.suffix_decoding_max_tree_depth - 1)
    return SuffixSpeculator(settings, SpeculatorTraits(max_nodes=most, max_depth=depth, learns=True))
