"""Which KV blocks hold the entries of which tokens, and in which order those that no row holds are given up."""

from __future__ import annotations

from collections.abc import Sequence

import attrs


@attrs.define(eq=False)
class CachedBlock:
    """A full block that rows with the same tokens may share.

    Attributes:
        digest: names its tokens and all tokens before them.
        followers: for each speculator that wrote all its entries of this block, the token that followed the block then: the
            last entry may depend on it.
    """

    digest: bytes
    followers: dict[int, int] = attrs.field(factory=dict)


class PrefixIndex:
    """The cached blocks of an allocator, by digest, and those that no row holds, the first to be evicted first."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._contents: dict[int, CachedBlock] = {}
        self._idle: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._contents)

    @property
    def num_idle(self) -> int:
        """Cached blocks that no row holds."""
        return len(self._idle)

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached beginning of a sequence."""
        found = []
        for digest in digests:
            block = self._blocks.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def get(self, block: int) -> CachedBlock | None:
        """What a block holds, if it is cached."""
        return self._contents.get(block)

    def add(self, block: int, digest: bytes) -> None:
        """Caches a block that a row holds, unless another one with the same tokens is cached."""
        if digest not in self._blocks:
            self._contents[block] = CachedBlock(digest)
            self._blocks[digest] = block

    def remove(self, block: int) -> bool:
        """Forgets a block; returns whether it was cached and no row held it."""
        content = self._contents.pop(block, None)
        if content is None:
            return False
        del self._blocks[content.digest]
        if block not in self._idle:
            return False
        del self._idle[block]
        return True

    def rest(self, block: int) -> bool:
        """Keeps a block that its last row released; returns whether it is cached."""
        if block not in self._contents:
            return False
        self._idle[block] = None
        return True

    def wake(self, block: int) -> None:
        """A row holds a block again."""
        self._idle.pop(block, None)

    def oldest(self, count: int) -> list[int]:
        """The idle blocks to evict first."""
        return [block for block, _ in zip(self._idle, range(count), strict=False)]

    def all(self) -> list[int]:
        """All cached blocks."""
        return list(self._contents)
