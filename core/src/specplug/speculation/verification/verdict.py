"""Checks what a plugin's `verify` returns."""

from __future__ import annotations

from typing import Any

from specplug.contract.types import Proposal
from specplug.contract.verification import Verdict
from specplug.errors import PluginError
from specplug.values import as_integer, is_integer, shown


def check_verdict(verdict: Any, proposal: Proposal, vocab_size: int) -> Verdict:
    """Returns the verdict with Python integers.

    Raises:
        PluginError: a row is not a path of the draft tree from the root, or its next token is not in the vocabulary.
    """
    if not isinstance(verdict, Verdict):
        raise PluginError(f"verify returned {type(verdict).__name__}, expected a Verdict")
    if not len(verdict.accepted) == len(verdict.next_tokens) == len(proposal.tokens):
        raise PluginError(f"verify returned {len(verdict.next_tokens)} rows for a batch of {len(proposal.tokens)}")
    accepted = [[as_integer(node) for node in path] for path in verdict.accepted]
    next_tokens = [as_integer(token) for token in verdict.next_tokens]
    for row, (path, token) in enumerate(zip(accepted, next_tokens, strict=True)):
        parents = proposal.parents[row] if proposal.parents is not None else None
        at = -1
        for node in path:
            is_node = is_integer(node, 0) and node < len(proposal.tokens[row])
            if not is_node or (node - 1 if parents is None else parents[node]) != at:
                raise PluginError(f"verify accepted {shown(path)} in row {row}, which is not a path from the root")
            at = node
        if not is_integer(token, 0) or token >= vocab_size:
            raise PluginError(
                f"verify chose token {shown(token)} in row {row}, which is not in the vocabulary of {vocab_size}"
            )
    return Verdict(accepted, next_tokens)
