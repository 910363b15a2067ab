"""The rows of a forward: new tokens, where their KV goes, and what each may attend to."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch

from specplug.model.kv_cache import BlockTable
from specplug.model.pending import UpcomingTokens


@attrs.frozen(eq=False)
class TreeMask:
    """The tree mask of a row: which entries after its linear prefix the new tokens may attend to, and their positions.

    Attributes:
        prefix: how many KV entries of the row are plain committed tokens, visible to all new tokens.
        visible: bool [new tokens, entries after the prefix]: ancestors and self. The new tokens are the last entries.
        positions: the position of each entry after the prefix (committed length + depth).
    """

    prefix: int
    visible: torch.Tensor
    positions: Sequence[int]

    @staticmethod
    def from_parents(prefix: int, parents: Sequence[int]) -> TreeMask:
        """The mask of a root token (the last committed one, at KV index `prefix`) followed by its draft tree.

        Args:
            prefix: KV entries before the root.
            parents: each node's parent as a node index, -1 for the root; parents come before their children.
        """
        count = len(parents) + 1
        visible_bits, positions = [1], [prefix]  # ancestors as bits of an int: a torch call per node would take longer
        for node, parent in enumerate(parents, start=1):
            visible_bits.append(visible_bits[parent + 1] | 1 << node)
            positions.append(positions[parent + 1] + 1)
        width = -(-count // 8)
        packed = np.frombuffer(b"".join(bits.to_bytes(width, "little") for bits in visible_bits), dtype=np.uint8)
        visible = np.unpackbits(packed.reshape(count, width), axis=1, count=count, bitorder="little").view(np.bool_)
        return TreeMask(prefix, torch.from_numpy(visible), positions)


@attrs.define(eq=False)  # several per row and step: frozen takes twice as long
class ForwardRow:
    """The new tokens of one row.

    Attributes:
        tokens: ids to run; their KV is stored at KV indices `start`, `start + 1`, …
        start: the KV index of the first token; entries before it are computed. Also its position, unless `tree` is given.
        table: the row's KV blocks; it must hold `start + len(tokens)` entries.
        tree: for tokens that are not a plain continuation.
        first: KV entries before this index are masked: they were never stored.
        slot: of the row's recurrent state, if the model has any.
        held: how many of the last tokens may turn out to be rejected, so that a later forward may begin before them; matters
            for recurrent state alone.
        adapter: the slot of the row's LoRA adapter; -1 for none.
        upcoming: for a loop (`Resources.compile_loop`): what the placeholders at the end of `tokens` stand for. The loop goes
            on after those that come.
    """

    tokens: Sequence[int]
    start: int
    table: BlockTable
    tree: TreeMask | None = None
    first: int = 0
    slot: int = -1
    held: int = 0
    adapter: int = -1
    upcoming: UpcomingTokens | None = None

    @property
    def spare(self) -> int:
        """How many of the last tokens may not come."""
        return 0 if self.upcoming is None else len(self.upcoming) - 1

    @property
    def positions(self) -> Sequence[int]:
        """The position of each token."""
        if self.tree is None:
            return range(self.start, self.start + len(self.tokens))
        return self.tree.positions[len(self.tree.positions) - len(self.tokens) :]
