"""Core's verifier: for every row the lossless rule that accepts the most tokens.

| row                                              | rule                                                     |
|--------------------------------------------------|----------------------------------------------------------|
| greedy; seeded; no draft; deterministic draft    | sample and match (`matching`)                            |
| sampled chain                                    | block verification or standard rejection (`chains`)      |
| sampled tree                                     | recursive rejection without replacement (`siblings`)     |
"""

from __future__ import annotations

from specplug.contract.hooks import hookimpl
from specplug.contract.types import Proposal
from specplug.contract.verification import TargetDistributions, Verdict, VerificationBatch
from specplug.sampling.randomness import EngineRandomness
from specplug.sampling.workspace import Workspace
from specplug.speculation.verification import chains, matching, siblings


class LosslessVerifier:
    """The default implementation of `verify`."""

    def __init__(
        self, randomness: EngineRandomness, chain_rule: str = "block", workspace: Workspace | None = None
    ) -> None:
        self._randomness = randomness
        self._workspace = workspace
        self._chain_rule = chain_rule

    @hookimpl(trylast=True)
    def verify(self, batch: VerificationBatch, proposal: Proposal, target: TargetDistributions) -> Verdict:
        """See `SpeculatorHooks.verify`."""
        count = len(batch.rows)
        matched: list[int] = []
        sampled_chains: list[int] = []
        sampled_trees: list[int] = []
        for row, entry in enumerate(batch.rows):
            probs = proposal.probs[row] if proposal.probs is not None else None
            if probs is None or entry.sampling.greedy or entry.sampling.seed is not None:
                matched.append(row)
            elif proposal.parents is None or proposal.parents[row] is None:
                sampled_chains.append(row)
            else:
                sampled_trees.append(row)
        accepted: list[list[int]] = [[] for _ in range(count)]
        next_tokens = [-1] * count
        if matched:
            drawn = matching.sample_and_match(matched, batch, proposal, target, self._randomness, self._workspace)
            for row, path, token in drawn:
                accepted[row], next_tokens[row] = path, token
        for rows, rule in (
            (sampled_chains, chains.block if self._chain_rule == "block" else chains.standard),
            (sampled_trees, siblings.recursive_rejection),
        ):
            if rows:
                for row, path, token in rule(rows, batch, proposal, target, self._randomness):
                    accepted[row], next_tokens[row] = path, token
        return Verdict(accepted, next_tokens)
