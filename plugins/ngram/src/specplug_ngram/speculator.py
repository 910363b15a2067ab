"""The `ngram` method: its settings, and the speculator with one index per row."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from specplug import ConfigurationError, Proposal, SpeculatorTraits, hookimpl
from specplug_ngram.index import NgramIndex

if TYPE_CHECKING:
    from specplug import ProposalBatch, ProposalRow, SpeculativeConfig, TargetModel

DEFAULT_LOOKUP = 5
_COMPARED_TOKENS = 16


@attrs.frozen
class NgramSettings:
    """The keys of the method, with vLLM's names and defaults. If only one is given, the other equals it.

    Attributes:
        prompt_lookup_max: the longest n-gram to look up, in tokens.
        prompt_lookup_min: the shortest.
    """

    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None

    def lengths(self) -> range:
        """Returns the n-gram lengths to look up, shortest first.

        Raises:
            ConfigurationError: a length below 1, or a minimum above the maximum.
        """
        for field in attrs.fields(NgramSettings):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ConfigurationError(f"speculative_config: {field.name}={value}: expected an integer of at least 1")
        longest, shortest = self.prompt_lookup_max, self.prompt_lookup_min
        if longest is None:
            longest = DEFAULT_LOOKUP if shortest is None else shortest
        if shortest is None:
            shortest = longest
        if shortest > longest:
            raise ConfigurationError(
                f"speculative_config: prompt_lookup_min={shortest} is more than prompt_lookup_max={longest}; "
                "lower prompt_lookup_min or raise prompt_lookup_max"
            )
        return range(shortest, longest + 1)


@attrs.define(eq=False)
class NgramSpeculator:
    """Drafts the tokens that followed an earlier occurrence of a row's last tokens.

    It takes the longest n-gram that occurred before, and its most recent occurrence. A draft that reaches the end of the
    known tokens continues with its own beginning, as periodic text does.

    Attributes:
        shortest: the fewest tokens of a match.
        longest: the most tokens of a match.
    """

    traits: ClassVar[SpeculatorTraits] = SpeculatorTraits(token_only=True)

    shortest: int
    longest: int
    _indexes: dict[int, NgramIndex] = attrs.field(factory=dict, init=False, repr=False)

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        """Drafts a chain for every row whose last tokens occurred before."""
        for row_id, _ in batch.ended:
            self._indexes.pop(row_id, None)
        return Proposal([self._draft(row) for row in batch.rows])

    def _draft(self, row: ProposalRow) -> list[int]:
        index = self._updated_index(row)
        count = min(row.budget.max_nodes, row.budget.max_depth)
        start = index.find() if count > 0 else None
        return [] if start is None else index.continuation(start, count)

    def _updated_index(self, row: ProposalRow) -> NgramIndex:
        index = self._indexes.get(row.row_id)
        if index is None or row.is_new or not _continues(index.tokens, row):
            index = self._indexes[row.row_id] = NgramIndex(self.shortest, self.longest)
        index.extend(row.tokens[len(index.tokens) :])
        return index


def _continues(known: list[int], row: ProposalRow) -> bool:
    """Whether a row's tokens continue the known ones, judged by the last of these; a host may reuse a row_id unannounced."""
    start = max(0, len(known) - _COMPARED_TOKENS)
    return row.tokens[start : len(known)] == known[start:]


@hookimpl
def load_speculator(config: SpeculativeConfig, target: TargetModel) -> NgramSpeculator:
    """Makes the speculator; see `NgramSettings` for its keys.

    Raises:
        ConfigurationError: an unknown key, or invalid n-gram lengths.
    """
    lengths = config.settings(NgramSettings).lengths()
    return NgramSpeculator(shortest=lengths[0], longest=lengths[-1])


def transformers_options(config: SpeculativeConfig) -> dict[str, int]:
    """Returns the arguments of Transformers' `generate` for its prompt lookup, with which `specplug bench` compares."""
    lengths = config.settings(NgramSettings).lengths()
    return {"prompt_lookup_num_tokens": config.num_speculative_tokens, "max_matching_ngram_size": lengths[-1]}
