"""What a verified step does to one request: new tokens, the KV entries to move, and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specplug.contract.types import Outcome
from specplug.engine.target_step import TargetStep
from specplug.model.kv_cache import BlockAllocator, KVCache
from specplug.request import Request, StepOutput
from specplug.sampling.logprobs import gather_logprobs
from specplug.stats import SpeculationStats

_OWN: list[str | None] = [None]


def commit_tokens(request: Request, path: Sequence[int], next_token: int, total: SpeculationStats) -> StepOutput:
    """Appends the accepted path of a request's draft and the next token, and counts them.

    Args:
        request: the request; its draft is consumed.
        path: the accepted nodes of its draft.
        next_token: the token after them.
        total: the engine's counters.
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
    taken = len(request.tokens) - before
    nodes, method = (0, "") if draft is None else (len(draft), draft.method)
    for stats in (request.stats, total):
        stats.record(nodes, min(taken, len(path)), method)
    request.outcome = None if draft is None else Outcome(method, nodes, tuple(path), tuple(draft.tokens))
    request.draft = None
    texts = [] if request.text is None or request.error else request.text.take(taken)
    return StepOutput(request, request.tokens[before:], sources[:taken], texts)


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


def score_output(output: StepOutput, logits: torch.Tensor, entries: list[int]) -> None:
    """Stores the log-probabilities of new tokens, if they were requested."""
    count = output.request.params.logprobs
    if count is not None:
        used = entries[: len(output.new_tokens)]
        try:
            output.request.logprobs += gather_logprobs(logits[used], output.new_tokens, count)
        except Exception as error:  # for example, too little memory for those of the whole vocabulary
            output.request.fail(error)


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
