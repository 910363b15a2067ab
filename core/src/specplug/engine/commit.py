"""What a verified step does to requests: new tokens, the KV entries to move, log-probabilities, and what is delivered."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from specplug.contract.types import Outcome
from specplug.engine.target_step import TargetStep
from specplug.model.kv_cache import BlockAllocator, KVCache
from specplug.request import Request, StepOutput
from specplug.sampling.logprobs import gather_logprobs
from specplug.stats import SpeculationStats

_OWN: list[str | None] = [None]


@attrs.define(eq=False)  # several per row and step: frozen takes twice as long
class Committed:
    """What a step committed for one request, before it is counted and its text is decoded.

    Attributes:
        request: the request.
        first: the index of its first new token.
        sources: for each new token the method that drafted it; None for the target's own.
        method: of the draft that was verified; empty if there was none.
        num_nodes: of that draft.
        num_accepted: how many of the new tokens are accepted nodes.
    """

    request: Request
    first: int
    sources: list[str | None]
    method: str = ""
    num_nodes: int = 0
    num_accepted: int = 0

    @property
    def new_tokens(self) -> list[int]:
        """The committed ids."""
        return self.request.tokens[self.first : self.first + len(self.sources)]

    def deliver(self, total: SpeculationStats) -> StepOutput:
        """Counts them, and decodes their text.

        Args:
            total: the engine's counters.
        """
        request, taken = self.request, len(self.sources)
        for stats in (request.stats, total):
            stats.record(self.num_nodes, self.num_accepted, self.method)
        texts: list[str] = []
        if request.text is not None and not request.error:
            try:
                texts = request.text.take(taken)
            except Exception as error:  # the tokenizer fails on its own ids
                request.fail(error)
        return StepOutput(request, self.new_tokens, self.sources, texts)


class StepOutputs:
    """The outputs of the current step. On a GPU those of one step are delivered once the next one's forward runs."""

    def __init__(self) -> None:
        self._committed: list[Committed | StepOutput] = []
        self._delivered: dict[int, StepOutput] = {}  # by the request's number

    def add(self, entry: Committed | StepOutput) -> None:
        """Takes in what was committed, or an output that has been counted and decoded."""
        self._committed.append(entry)

    @property
    def has_ended(self) -> bool:
        """Whether a request has ended whose last tokens wait: nobody may learn of an end before the tokens."""
        return any(entry.request.is_finished for entry in self._committed)

    def has(self, request: Request) -> bool:
        """Whether there is an output of a request."""
        return request.number in self._delivered or any(entry.request is request for entry in self._committed)

    def deliver(self, total: SpeculationStats) -> None:
        """Counts what was committed, decodes its text, and hands it to whoever listens.

        Args:
            total: the engine's counters.
        """
        committed, self._committed = self._committed, []
        for entry in committed:
            output = entry.deliver(total) if isinstance(entry, Committed) else entry
            before = self._delivered.get(output.request.number)
            self._delivered[output.request.number] = output if before is None else before.joined(output)
            if output.request.listener is not None:
                output.request.listener.add(output)

    def drop(self, request: Request) -> None:
        """Forgets what would be returned of a request that was aborted; listeners have had it."""
        self._delivered.pop(request.number, None)

    def take(self) -> list[StepOutput]:
        """What was delivered since the last call, one output per request."""
        delivered, self._delivered = self._delivered, {}
        return list(delivered.values())


def commit_tokens(request: Request, path: Sequence[int], next_token: int) -> Committed:
    """Appends the accepted path of a request's draft and the next token.

    Args:
        request: the request; its draft is consumed.
        path: the accepted nodes of its draft.
        next_token: the token after them.
    """
    draft = request.draft
    before = len(request.tokens)
    tokens, sources = [next_token], _OWN
    if path and draft is not None:
        tokens = [*(draft.tokens[node] for node in path), next_token]
        sources = [*[draft.method] * len(path), None]
    try:
        request.append(tokens, sources)
    except Exception as error:  # the tokenizer fails on its own ids
        request.fail(error)
    sources = sources[: len(request.tokens) - before]
    request.draft = None
    if draft is None:
        request.outcome = None
        return Committed(request, before, sources)
    request.outcome = Outcome(draft.method, len(draft), tuple(path), tuple(draft.tokens))
    return Committed(request, before, sources, draft.method, len(draft), min(len(sources), len(path)))


def kv_moves(request: Request, first: int, path: Sequence[int]) -> list[tuple[int, int]]:
    """KV slots (from, to) that make an accepted path contiguous from position `first` on; a chain needs none."""
    assert request.table is not None
    slots = request.table.slots
    moves = []
    for depth, node in enumerate(path):
        if node != depth:
            source, destination = first + node, first + depth
            moves.append((slots(source, source + 1)[0], slots(destination, destination + 1)[0]))
    return moves


def score_output(committed: Committed, logits: torch.Tensor, entries: list[int]) -> None:
    """Stores the log-probabilities of new tokens, if they were requested."""
    request, tokens = committed.request, committed.new_tokens
    count = request.params.logprobs
    if count is not None:
        used = entries[: len(tokens)]
        try:
            request.logprobs += gather_logprobs(logits[used], tokens, count)
        except Exception as error:  # for example, too little memory for those of the whole vocabulary
            request.fail(error)


def score_prompts(target: TargetStep) -> None:
    """Stores the log-probabilities of prompt tokens, if they were requested."""
    for request, entry, positions in target.scored:
        first = len(request.prompt_logprobs) + 1
        tokens = request.tokens[first : first + positions]
        count = request.params.prompt_logprobs
        assert count is not None
        try:
            request.prompt_logprobs += gather_logprobs(target.logits[entry : entry + positions], tokens, count)
        except Exception as error:
            request.fail(error)


def clear_kv(request: Request, allocator: BlockAllocator, caches: Sequence[KVCache], block_size: int) -> None:
    """Clears and forgets the blocks that a failed request shares with no other.

    Masked entries are multiplied by zero, and NaN times zero is NaN: it may leave none behind.
    """
    if request.table is None:
        return
    own = [block for block in request.table.blocks if not allocator.is_shared(block)]
    allocator.forget(own)
    for cache in caches:
        cache.clear([slot for block in own for slot in range(block * block_size, (block + 1) * block_size)])
