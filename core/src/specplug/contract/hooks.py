"""The five hooks of a speculator. Read this file first, then `types.py`.

A plugin is a module that an entry point of group `specplug` names; the name of the entry point is the method that users
configure. The module implements `load_speculator`, which returns an object. The other hooks are the object's `@hookimpl`
methods; only `propose` is required:

    from specplug import Proposal, hookimpl

    class RepeatLast:
        @hookimpl
        def propose(self, batch):
            return Proposal([[row.tokens[-1]] * row.budget.max_nodes for row in batch.rows])

    @hookimpl
    def load_speculator(config, target):
        return RepeatLast()

Core calls the hooks in this order:

    load_speculator → plan_memory → (weights are loaded, memory is allocated) → warmup → (propose → verify) per step

A hook may take fewer arguments than its specification names; later versions only add arguments. A plugin may also *observe*
a hook, with a function marked `@hookimpl(wrapper=True)` that returns what `yield` gave. Unlike in pluggy, such a wrapper
cannot change the result. A module under an entry point of group `specplug.observers` observes every engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from specplug.contract.models import TargetModel
    from specplug.contract.resources import MemoryBudget, MemoryRegion, Resources
    from specplug.contract.settings import SpeculativeConfig
    from specplug.contract.types import Proposal, ProposalBatch, Speculator
    from specplug.contract.verification import TargetDistributions, Verdict, VerificationBatch

PROJECT = "specplug"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class SpeculatorHooks:
    """The hook specifications."""

    @hookspec(firstresult=True)
    def load_speculator(self, config: SpeculativeConfig, target: TargetModel) -> Speculator | None:
        """Makes the speculator of one engine. The plugin's module implements it; core calls it once, before it reads weights.

        Read configuration and checkpoint headers here, not weights: `target.model(...)` and `target.weights(...)` return
        handles, whose weights core loads after it accepted the memory plan.

        Args:
            config: the user's `speculative_config`. Read the plugin's keys with `config.get` or `config.settings`. A key
                that was never read is an error.
            target: the target: its sizes, tokenizer, embedding and LM head, and handles to other checkpoints.

        Returns:
            The speculator. Its optional attribute `traits` declares the target states that it needs and what it promises.

        Raises:
            ConfigurationError: the settings cannot work; the user sees the message unchanged.

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
        """Declares the memory that the speculator will use, known from headers. Optional for one that uses none.

        Args:
            budget: the limits that everything must fit.

        Returns:
            One `MemoryRegion` per kind of use. Core chooses the number of KV blocks so that everything fits.

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
                print(dict(llm.engine.plan.parts))  # "verification buffers" contains 4 bytes per row
        """

    @hookspec(firstresult=True)
    def warmup(self, resources: Resources) -> None:
        """Called once, after weights are loaded and memory is allocated. Store `resources`; run each shape once.

        Args:
            resources: the KV caches by region name, the numbers of rows to warm up for, the step compiler.

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
                        self.counts[row.row_id] += 1

            counts = Counts()
            plugins = {"counts": lambda config, target: counts}
            with LLM("tiny", plugins=plugins, speculative_config={"method": "counts"}) as llm:
                llm.generate("import os")
            assert counts.counts.sum() > 0
        """

    @hookspec(firstresult=True)
    def propose(self, batch: ProposalBatch) -> Proposal | None:
        """Called after every target step; of a speculator that `drafts_early` maybe during it. The only hook that is required.

        Handle `batch.ended` first: forget those rows. Then ingest `row.new_positions` of each row, then draft at most
        `row.budget`. With a budget of zero nodes, only ingest; the budget is zero while a prompt is computed in chunks. A call
        without rows only delivers `ended`: return an empty proposal or None.

        Args:
            batch: the rows, valid only during the call.

        Returns:
            One draft per row, in the order of `batch.rows`; None for no drafts. An empty draft is always legal.

        A proposal never changes the distribution of the output: a bad draft costs time, not correctness. After an exception
        or an invalid proposal, the step has no drafts and a warning is logged. The speculator does not see the rows of that
        call again, since their state may be inconsistent, unless it declares `token_only`; it still sees new rows. After three
        faults in a row it is switched off.

        Example:
            from specplug import LLM, Proposal, hookimpl

            class Successors:  # what followed each token last, in each row
                def __init__(self):
                    self.rows = {}

                @hookimpl
                def propose(self, batch):
                    for row_id, reason in batch.ended:
                        self.rows.pop(row_id, None)
                    return Proposal([self.draft(row) for row in batch.rows])

                def draft(self, row):
                    if row.is_new:
                        self.rows[row.row_id] = ({}, 0)
                    after, seen = self.rows[row.row_id]
                    for index in range(seen, len(row.tokens) - 1):
                        after[row.tokens[index]] = row.tokens[index + 1]
                    self.rows[row.row_id] = (after, len(row.tokens) - 1)
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
        """Decides which draft tokens are accepted. Few plugins implement it: core's lossless verifier is the default.

        Args:
            batch: the rows with their sampling parameters and random streams.
            proposal: the drafts, one entry per row of `batch`, validated by core.
            target: the target's distributions at the root and after every node.

        Returns:
            The accepted path and the next token of every row; None to leave the decision to core's verifier. Reports name a
            method that implements `verify` as not verified by core; one that wraps it is not named.

        Example:
            from specplug import LLM, Proposal, Verdict, hookimpl

            class Lenient:  # accepts the target's two most likely tokens: not lossless
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
