"""The five hooks of a speculator. This file is the contract; everything else in core serves it.

A plugin is a module named by an entry point of group `specplug`; the entry point's name is the method that users put in
their configuration. The module implements `load_speculator`, which returns an object; the object's `@hookimpl` methods
are the other hooks. Only `propose` is needed:

    from specplug import Proposal, hookimpl

    class RepeatLast:
        @hookimpl
        def propose(self, batch):
            return Proposal([[row.tokens[-1]] * row.budget.max_nodes for row in batch.rows])

    @hookimpl
    def load_speculator(config, target):
        return RepeatLast()

Core calls the hooks in this order:

    load_speculator → plan_memory → (weights are loaded, memory is allocated) → warmup → (propose → verify)*

A hook may take fewer arguments than its specification names; later versions may only add arguments. A module may also
implement *wrappers* (`@hookimpl(wrapper=True)`) around any hook to observe it: look, but return what `yield` gave. Under an
entry point of group `specplug.observers` such a module observes every engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from specplug.contract.batch import ProposalBatch, VerificationBatch
    from specplug.contract.memory import MemoryBudget, MemoryRegion
    from specplug.contract.proposal import Proposal
    from specplug.contract.resources import Resources
    from specplug.contract.settings import SpeculativeConfig
    from specplug.contract.target import TargetModel
    from specplug.contract.verdict import TargetDistributions, Verdict

PROJECT = "specplug"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class SpeculatorHooks:
    """The hook specifications, registered with every engine's own PluginManager."""

    @hookspec(firstresult=True)
    def load_speculator(self, config: SpeculativeConfig, target: TargetModel) -> Any | None:
        """Makes the speculator of one engine. Implemented by the plugin's module; called once, before any weight is read.

        Read configuration and checkpoint headers here, never weights: `target.model(...)` and `target.weights(...)`
        return lazy handles, which core fills after the memory plan was accepted.

        Args:
            config: the user's `speculative_config`. Read your keys with `config.get` or `config.settings`; a key that
                nobody read is reported to the user as unknown.
            target: what the target model is, and what it lends to speculators.

        Returns:
            The speculator: any object with `@hookimpl` methods. Its optional attribute `traits`
            (`specplug.SpeculatorTraits`) declares which target states it needs and what it promises.

        Raises:
            ConfigurationError: for settings that cannot work; the message reaches the user as it is.

        Example:
            from specplug import LLM, ConfigurationError, Proposal, hookimpl

            class Always:
                def __init__(self, token):
                    self.token = token

                @hookimpl
                def propose(self, batch):
                    return Proposal([[self.token] * row.budget.max_nodes for row in batch.rows])

            @hookimpl
            def load_speculator(config, target):
                token = config.get("token", 0)
                if not 0 <= token < target.vocab_size:
                    raise ConfigurationError(f"always.token={token}: expected an id below {target.vocab_size}")
                return Always(token)

            always = {"method": "always", "token": 5}
            with LLM("tiny", plugins={"always": load_speculator}, speculative_config=always) as llm:
                llm.generate("import os")
        """

    @hookspec(firstresult=True)
    def plan_memory(self, budget: MemoryBudget) -> list[MemoryRegion]:  # type: ignore[empty-body]
        """Says what memory the speculator will hold, from headers alone. Not needed by a speculator that holds none.

        Args:
            budget: the limits everything must fit.

        Returns:
            One `MemoryRegion` per kind of use. Core solves for the number of KV blocks so that all parts fit.

        Example:
            from specplug import LLM, MemoryRegion, Proposal, hookimpl

            class Ranked:
                @hookimpl
                def plan_memory(self, budget):
                    return [MemoryRegion("ranks", "buffers", fixed_bytes=4 * budget.max_num_seqs)]

                @hookimpl
                def propose(self, batch):
                    return None

            plugins = {"ranked": lambda config, target: Ranked()}
            with LLM("tiny", plugins=plugins, speculative_config={"method": "ranked"}, max_num_seqs=4) as llm:
                print(dict(llm.engine.plan.parts))  # the four bytes of every row are in "verification buffers"
        """

    @hookspec(firstresult=True)
    def warmup(self, resources: Resources) -> None:
        """Called once, after everything is loaded and allocated. Keep what you need of `resources`; run every shape.

        Args:
            resources: KV caches by region name, the announced shape buckets, limits.

        Example:
            import torch

            from specplug import LLM, MemoryRegion, Proposal, hookimpl

            class Counts:
                @hookimpl
                def plan_memory(self, budget):
                    self.size = budget.max_num_seqs
                    return [MemoryRegion("counts", "buffers", fixed_bytes=8 * self.size)]

                @hookimpl
                def warmup(self, resources):
                    self.counts = torch.zeros(self.size, dtype=torch.int64, device=resources.device)

                @hookimpl
                def propose(self, batch):
                    for row in batch.rows:
                        self.counts[row.slot] += 1

            counts = Counts()
            plugins = {"counts": lambda config, target: counts}
            with LLM("tiny", plugins=plugins, speculative_config={"method": "counts"}) as llm:
                llm.generate("import os")
            assert counts.counts.sum() > 0
        """

    @hookspec(firstresult=True)
    def propose(self, batch: ProposalBatch) -> Proposal | None:
        """Called after every target step, with the rows that the speculator follows. The only hook that is required.

        Handle `batch.ended` first (forget those slots), then bring your state up to date over `row.computed`, then
        draft at most `row.budget` per row. A budget of zero nodes means: update your state, propose nothing; so it is
        while a prompt is computed in chunks. A call without rows only delivers `ended`: return an empty proposal or None.

        Args:
            batch: the rows, valid only during the call.

        Returns:
            One draft per row, in the order of `batch.rows`; None for no drafts at all. Zero drafts are always legal.

        Whatever is proposed, output stays distributed as the target's own: a bad draft costs time, never correctness.
        An exception, or a proposal that breaks the contract, costs the drafts of this step and is reported. The rows of
        that call may be half-updated, so they do not come back (those of a `token_only` speculator do); new rows come as
        before. After three faults in a row the speculator is not asked any more.

        Example:
            from specplug import LLM, Proposal, hookimpl

            class Successors:  # what followed each token last, in each row
                def __init__(self):
                    self.rows = {}

                @hookimpl
                def propose(self, batch):
                    for slot, reason in batch.ended:
                        self.rows.pop(slot, None)
                    return Proposal([self.draft(row) for row in batch.rows])

                def draft(self, row):
                    if row.is_new:
                        self.rows[row.slot] = ({}, 0)
                    after, seen = self.rows[row.slot]
                    for index in range(seen, len(row.tokens) - 1):
                        after[row.tokens[index]] = row.tokens[index + 1]
                    self.rows[row.slot] = (after, len(row.tokens) - 1)
                    draft = [row.tokens[-1]]
                    while len(draft) <= row.budget.max_nodes and draft[-1] in after:
                        draft.append(after[draft[-1]])
                    return draft[1:]

            successors = Successors()
            plugins = {"successors": lambda config, target: successors}
            with LLM("tiny", plugins=plugins, speculative_config={"method": "successors"}) as llm:
                print(llm.generate("x = [0, 0, 0,")[0].outputs[0].metrics)
        """

    @hookspec(firstresult=True)
    def verify(self, batch: VerificationBatch, proposal: Proposal, target: TargetDistributions) -> Verdict | None:
        """Decides which drafts are kept. Core's lossless verifier answers last; almost nobody implements this.

        Args:
            batch: the rows under verification with their sampling parameters and random streams.
            proposal: the drafts, one entry per row of `batch`, already checked by core.
            target: the target's distributions at the root and after every draft node.

        Returns:
            The accepted path and the next token of every row; None to leave it to the next implementation. A method
            that overrides `verify` is named as not verified by core wherever its results are reported; one that wraps it is
            not, for a wrapper cannot change a verdict.

        Example:
            from specplug import LLM, Proposal, Verdict, hookimpl

            class Lenient:  # keeps what is one of the target's two most likely tokens: not lossless
                @hookimpl
                def propose(self, batch):
                    return Proposal([[row.tokens[-1]] * row.budget.max_nodes for row in batch.rows])

                @hookimpl
                def verify(self, batch, proposal, target):
                    accepted, following = [], []
                    for tokens, entry in zip(proposal.tokens, target.offsets):
                        kept = 0
                        while kept < len(tokens) and tokens[kept] in target.logits[entry + kept].topk(2).indices:
                            kept += 1
                        accepted.append(list(range(kept)))
                        following += target.argmax([entry + kept])
                    return Verdict(accepted, following)

            plugins = {"lenient": lambda config, target: Lenient()}
            with LLM("tiny", plugins=plugins, speculative_config={"method": "lenient"}) as llm:
                assert llm.generate("x = [0, 0, 0,")[0].outputs[0].unverified_methods in ([], ["lenient"])
        """
