"""The keys of the `eagle` and `eagle3` methods."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import attrs

from specplug import ConfigurationError
from specplug_eagle.checkpoint.layer_ids import Convention

SAMPLE_METHODS = ("greedy", "probabilistic")
AUTHORS_DEPTH, AUTHORS_TOP_K, AUTHORS_TOTAL = 7, 10, 60


@attrs.frozen
class EagleSettings:
    """The keys of both methods, with vLLM's names where vLLM has them.

    Without a tree key the head drafts a chain of `num_speculative_tokens`. `speculative_token_tree` selects a static tree; each
    of the `tree_*` keys selects EAGLE-2's dynamic tree, with the authors' defaults for the others.

    Attributes:
        model: the head's checkpoint: a folder or hub name; `tiny` is the head in this package.
        revision: the revision of a hub name.
        draft_sample_method: `greedy` drafts the most likely tokens. `probabilistic` samples with the request's temperature
            and truncation, siblings without replacement, and more of its drafts are accepted. Requests at temperature 0 or
            with a seed, and dynamic trees, get the most likely tokens with either.
        speculative_token_tree: paths of sibling ranks, as a list or its Python text: `[(0,), (1,), (0, 0)]`; `eagle` is the
            authors' tree of 25 nodes.
        tree_depth: dynamic tree: draft forwards after the first level; the tree is one level deeper.
        tree_top_k: dynamic tree: nodes expanded per level, and children of each.
        tree_total_tokens: dynamic tree: nodes to verify, the root included.
        eagle_aux_hidden_state_layer_ids: the target states that an EAGLE-3 head reads, as boundaries (inputs of those
            layers); overrides the checkpoint's.
        layer_id_convention: the meaning of layer ids, `boundary` or `output`; overrides the detected one.
        norm_before_residual: overrides the checkpoint's flag.
        norm_output: overrides the checkpoint's flag.
        rope_theta: overrides the RoPE base.
    """

    model: str | None = None
    revision: str | None = None
    draft_sample_method: str = "probabilistic"
    speculative_token_tree: Any = None
    tree_depth: int | None = None
    tree_top_k: int | None = None
    tree_total_tokens: int | None = None
    eagle_aux_hidden_state_layer_ids: list[int] | None = None
    layer_id_convention: Convention | None = None
    norm_before_residual: bool | None = None
    norm_output: bool | None = None
    rope_theta: float | None = None

    def __attrs_post_init__(self) -> None:
        if self.draft_sample_method not in SAMPLE_METHODS:
            raise ValueError(
                f"draft_sample_method={self.draft_sample_method!r}: expected one of {', '.join(SAMPLE_METHODS)}"
            )
        for name, least in (("tree_depth", 0), ("tree_top_k", 1), ("tree_total_tokens", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected an integer of at least {least}")
        if self.is_dynamic and self.speculative_token_tree is not None:
            raise ValueError("speculative_token_tree and tree_* exclude each other: a tree is static or dynamic")

    @property
    def is_dynamic(self) -> bool:
        """Whether the settings select a dynamic tree."""
        return not (self.tree_depth is None and self.tree_top_k is None and self.tree_total_tokens is None)

    def dynamic_sizes(self) -> tuple[int, int, int]:
        """(depth, top k, total tokens) with the authors' defaults."""
        return (
            AUTHORS_DEPTH if self.tree_depth is None else self.tree_depth,
            self.tree_top_k or AUTHORS_TOP_K,
            self.tree_total_tokens or AUTHORS_TOTAL,
        )

    def static_paths(self) -> list[tuple[int, ...]] | None:
        """The paths of `speculative_token_tree`; None without it.

        Raises:
            ConfigurationError: it is not a list of paths.
        """
        tree = self.speculative_token_tree
        if tree is None:
            return None
        if tree == "eagle":
            return list(AUTHORS_TREE)
        if isinstance(tree, str):
            try:
                tree = ast.literal_eval(tree)
            except (ValueError, SyntaxError) as error:
                raise _not_a_tree(tree) from error
        if not isinstance(tree, Sequence) or isinstance(tree, str) or not tree:
            raise _not_a_tree(tree)
        paths = []
        for path in tree:
            ranks = [path] if isinstance(path, int) else path
            if not isinstance(ranks, Sequence) or isinstance(ranks, str) or not ranks:
                raise _not_a_tree(tree)
            if any(not isinstance(rank, int) or isinstance(rank, bool) or rank < 0 for rank in ranks):
                raise _not_a_tree(tree)
            paths.append(tuple(ranks))
        return paths


def _not_a_tree(tree: Any) -> ConfigurationError:
    shown = repr(tree) if len(repr(tree)) < 80 else repr(tree)[:77] + "..."
    return ConfigurationError(
        f"speculative_config: speculative_token_tree={shown}: expected paths of sibling ranks like [(0,), (1,), (0, 0)], "
        "or 'eagle'"
    )


def _paths_of(children: dict[tuple[int, ...], int]) -> tuple[tuple[int, ...], ...]:
    """The paths of a tree, from the number of children of each inner node."""
    return tuple((*parent, rank) for parent, count in children.items() for rank in range(count))


AUTHORS_TREE = _paths_of(
    {
        (): 4,
        (0,): 3,
        (1,): 2,
        (2,): 2,
        (3,): 1,
        (0, 0): 3,
        (0, 1): 2,
        (0, 2): 2,
        (1, 0): 1,
        (0, 0, 0): 3,
        (0, 0, 0, 0): 2,
    }
)
"""The EAGLE authors' static tree (`mc_sim_7b_63`): 25 nodes, depth 5."""
