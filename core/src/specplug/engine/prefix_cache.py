"""The prefix cache: rows that begin with tokens whose KV is in the cache already share its blocks and compute the rest.

Only full blocks are shared, and only with committed tokens: nothing is ever written to them again, except that a speculator
whose own entries are missing there stores them. A block is found by a SHA-256 digest of its tokens, all tokens before them
and the request's salt and adapter.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from hashlib import sha256

import attrs

from specplug.lora.registry import LoadedAdapter
from specplug.model.kv_cache import BlockAllocator
from specplug.request import Request
from specplug.speculation.target_states.ring_buffer import WINDOW


@attrs.frozen
class Sharer:
    """A speculator whose whole KV cache is addressed by the target's block tables.

    Attributes:
        index: its place in the chain.
        needs_states: whether it computes entries from target states, which cached positions do not have.
    """

    index: int
    needs_states: bool


@attrs.frozen
class Hit:
    """What a row finds in the cache.

    Attributes:
        blocks: the blocks of its first tokens.
        starts: sharer → how many of its first positions have that speculator's entries.
    """

    blocks: list[int] = attrs.field(factory=list)
    starts: dict[int, int] = attrs.field(factory=dict)


NO_HIT = Hit()


class PrefixCache:
    """Finds and fills the cached blocks of an engine. The blocks themselves are the allocator's.

    Args:
        block_size: tokens of a block.
        sharers: the speculators whose entries are cached with the target's.

    Attributes:
        num_queried_tokens: tokens of all requests that were looked up when they first started.
        num_hit_tokens: those of them that were found.
    """

    def __init__(self, block_size: int, sharers: Sequence[Sharer] = ()) -> None:
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._block_size = block_size
        self._sharers = tuple(sharers)

    def find(self, request: Request, allocator: BlockAllocator) -> Hit:
        """What a waiting row finds. Its last token is always computed, and so is what misses requested log-probabilities."""
        most = len(request.tokens) - 1
        if request.num_missing_prompt_logprobs:
            most = min(most, len(request.prompt_logprobs))
        blocks = allocator.cached.find(self._digests(request, most // self._block_size))
        if not blocks:
            return NO_HIT
        for sharer in self._sharers:
            if sharer.needs_states:
                blocks = self._trim(blocks, self._count_stored(sharer, blocks, request, allocator))
        starts = {sharer.index: self._count_stored(sharer, blocks, request, allocator) for sharer in self._sharers}
        return Hit(blocks, starts)

    def count(self, request: Request, hit: Hit) -> None:
        """Counts what a row found when it first started."""
        if request.num_cached_tokens is None:
            request.num_cached_tokens = len(hit.blocks) * self._block_size
            self.num_queried_tokens += len(request.tokens)
            self.num_hit_tokens += request.num_cached_tokens

    def store(self, requests: Sequence[Request], allocator: BlockAllocator) -> None:
        """Caches the new full blocks of committed tokens of running rows that have not failed."""
        size = self._block_size
        for request in requests:
            begin = request.num_stored_blocks
            if request.num_computed < (begin + 1) * size or request.error is not None:
                continue
            full = min(request.num_computed, len(request.tokens)) // size  # a request's end may cut accepted tokens
            assert request.table is not None
            for block, digest in zip(
                request.table.blocks[begin:full], self._digests(request, full)[begin:], strict=True
            ):
                allocator.cached.add(block, digest)
            request.num_stored_blocks = max(begin, full)

    def store_entries(
        self, requests: Sequence[Request], allocator: BlockAllocator, num_stored: Callable[[int, Request], int]
    ) -> None:
        """Notes which blocks of running rows speculators have written.

        Args:
            requests: the rows.
            allocator: of their blocks.
            num_stored: (sharer, row) → how many of its first positions have that speculator's entries.
        """
        size = self._block_size
        for index in [sharer.index for sharer in self._sharers]:
            for request in requests:
                begin, full = request.num_followed_blocks.get(index, 0), num_stored(index, request) // size
                if full <= begin:
                    continue
                assert request.table is not None
                for place in range(begin, full):
                    content = allocator.cached.get(request.table.blocks[place])
                    if content is not None:
                        content.followers[index] = request.tokens[(place + 1) * size]
                request.num_followed_blocks[index] = full

    def _digests(self, request: Request, count: int) -> list[bytes]:
        """The digests of a row's first full blocks, at least `count`."""
        digests, size = request.block_digests, self._block_size
        if len(digests) < count:
            last = digests[-1] if digests else _root(request.cache_salt, request.adapter)
            for begin in range(len(digests) * size, count * size, size):
                last = sha256(b"B" + last + array("q", request.tokens[begin : begin + size]).tobytes()).digest()
                digests.append(last)
        return digests[:count]

    def _count_stored(self, sharer: Sharer, blocks: Sequence[int], request: Request, allocator: BlockAllocator) -> int:
        """How many of the positions of some blocks have a speculator's entries, without a gap.

        One that reads target states pairs them with the next token, so that the last entry of a block depends on what followed.
        """
        size = self._block_size
        for place, block in enumerate(blocks):
            content = allocator.cached.get(block)
            follower = None if content is None else content.followers.get(sharer.index)
            if follower is None:
                return place * size
            if sharer.needs_states and follower != request.tokens[(place + 1) * size]:
                return (place + 1) * size - 1
        return len(blocks) * size

    def _trim(self, blocks: list[int], stored: int) -> list[int]:
        """Leaves out the last blocks where a speculator misses few entries: it needs the target's states there to go on."""
        missing = len(blocks) * self._block_size - stored
        return blocks[: stored // self._block_size] if 0 < missing <= WINDOW and stored else blocks


def _root(salt: str | None, adapter: LoadedAdapter | None) -> bytes:
    """What the digest of a row's first block begins with. No digest of a block is one of a salt: their first bytes differ.

    An adapter counts by its load and not by its name: what is loaded later under the same name is another one.
    """
    salted = b"" if salt is None else b"S" + salt.encode()
    return sha256(salted if adapter is None else b"L%d:" % adapter.serial + salted).digest()
