"""Speculators in an engine that is not specplug's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

import attrs

from specplug.config.speculative import parse_speculative_config
from specplug.contract.settings import SpeculativeConfig
from specplug.contract.types import EndReason, TokenView
from specplug.errors import ConfigurationError, PluginError
from specplug.host.limits import HostLimits
from specplug.host.loading import check_traits, load_speculators, wants_top_k_at_drafts
from specplug.host.memory import HostMemory
from specplug.host.rows import HostRow
from specplug.model.torch_state import own_torch_state
from specplug.plugins.registry import PluginRegistry, RegisteredSpeculator
from specplug.plugins.target import TargetFacade
from specplug.sampling.params import SamplingParams
from specplug.sampling.randomness import EngineRandomness, RowRandomness
from specplug.speculation.chain import SpeculatorChain
from specplug.speculation.deadline import Deadline
from specplug.speculation.draft import Draft
from specplug.speculation.draft_length import FixedDraftLength
from specplug.speculation.target_states.ring_buffer import Captured
from specplug.speculation.target_states.store import TargetStateStore, channels_for
from specplug.stats import SpeculationStats


class SpeculatorHost:
    """The speculators of an engine that is not specplug's.

    The engine makes a row for each of its sequences (`add`), says after every step what was committed
    (`HostRow.advance`), asks for drafts (`propose`), verifies them itself, and ends rows (`end`). Drafts are checked.
    What a speculator does wrong costs its drafts and is counted; after three faults in a row it is switched off.
    Observers that are installed see every call. A host belongs to one thread at a time.

    Args:
        config: what to load, with the keys and fallbacks of specplug's `speculative_config`. Draft lengths are fixed: with
            "auto", all drafts may have as many tokens as `max_num_speculative_tokens` allows.
        limits: the engine's sizes, and what it can do.
        target: the target as speculators see it; None knows no more than `limits`.
        plugins: methods that are not installed: see `specplug.LLM`.
        allowed: methods or packages that may be loaded; None allows all.
        denied: methods or packages that may not.
        strict: whether a speculator's fault is raised instead.
        timeout: the most seconds that one call of `propose` may take. It then runs in a thread of its own, and one that has
            not returned by then is switched off. None waits for ever.
        seed: of the random streams of rows.

    Attributes:
        limits: see above.
        stats: speculation counters of all rows together.
        planned_bytes: what the speculators use of memory: weights, KV caches and buffers.

    Raises:
        PluginError: a method is not installed or broken, or needs what this engine does not give.
        ConfigurationError: a plugin does not accept its settings.
        InsufficientMemoryError: speculators plan more memory than `limits.memory_bytes`.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | SpeculativeConfig,
        limits: HostLimits,
        *,
        target: TargetFacade | None = None,
        plugins: Mapping[str, Any] | None = None,
        allowed: Collection[str] | None = None,
        denied: Collection[str] = (),
        strict: bool = False,
        timeout: float | None = None,
        seed: int = 0,
    ) -> None:
        self.limits = limits
        parsed = parse_speculative_config(config) if isinstance(config, Mapping) else config
        if parsed is None:
            raise ConfigurationError(
                "speculative_config is None; a host needs a method, for example {'method': 'ngram'}"
            )
        self._target = target or TargetFacade.of_limits(
            vocab_size=limits.vocab_size,
            max_model_len=limits.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            num_layers=limits.num_layers,
        )
        with own_torch_state():
            registry = PluginRegistry(allowed, denied, plugins, strict=strict)
            registry.check(parsed)
            speculators = load_speculators(registry, parsed, self._target)
            for speculator in speculators:
                self._check(speculator)
            self._memory = HostMemory(speculators, limits, self._target)
        self.planned_bytes = self._memory.planned_bytes
        self._timeout = timeout
        device = self._target.device
        self._states = TargetStateStore(
            channels_for([s.traits for s in speculators], self._target.hidden_size, self._target.dtype),
            limits.max_num_seqs,
            limits.max_num_batched_tokens,
            device,
            at_drafts=wants_top_k_at_drafts(speculators),
        )
        self._chain = SpeculatorChain(
            speculators,
            self._states,
            FixedDraftLength(),
            vocab_size=limits.vocab_size,
            max_model_len=limits.max_model_len,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_num_draft_tokens=None,
            strict=strict,
        )
        self._randomness = EngineRandomness(seed, device)
        self._rows: set[HostRow] = set()
        self._free = list(range(limits.max_num_seqs))[::-1]
        self._count = 0
        self.stats = SpeculationStats()
        self._proposed_at: float | None = None
        self._is_warm = False

    # ---- loading --------------------------------------------------------------------------------------------------

    def _check(self, speculator: RegisteredSpeculator) -> None:
        """Refuses what this engine cannot give."""
        where = f"speculator '{speculator.method}'"
        if speculator.overrides_verify:
            raise PluginError(f"{where} has a verify of its own, which only specplug's own engine calls")
        if speculator.traits.needs_states and not self.limits.num_layers:
            raise PluginError(
                f"{where} reads target states (hidden_states or top_k), which this engine does not deliver"
            )
        check_traits(speculator, self.limits.num_layers, self.limits.vocab_size)

    def warm_up(self) -> None:
        """Loads the speculators' weights, allocates their memory, and calls `warmup`. `propose` does it if nobody did.

        Raises:
            SpecplugError: a checkpoint is damaged, or a speculator failed in `warmup`.
        """
        if self._is_warm:
            return
        target = self._target
        with own_torch_state():
            for handle in target.handles:
                handle.materialize(lambda fraction: None)
            self._chain.warmup(self._memory.allocate(self._states))
        if self._timeout is not None:
            for speculator in self._chain.speculators:
                speculator.propose = Deadline(speculator.propose, self._timeout, speculator.method)
        self._is_warm = True

    # ---- what it is -----------------------------------------------------------------------------------------------

    @property
    def speculators(self) -> list[RegisteredSpeculator]:
        """The speculators, in the order in which they are asked."""
        return self._chain.speculators

    @property
    def faults(self) -> dict[str, int]:
        """Faults by method."""
        return self._chain.faults

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds in `propose` by method."""
        return self._chain.seconds

    @property
    def enabled(self) -> dict[str, bool]:
        """Whether each method is still asked."""
        return self._chain.enabled

    # ---- rows -----------------------------------------------------------------------------------------------------

    def add(
        self,
        tokens: TokenView,
        *,
        num_prompt_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        num_computed: int | None = None,
    ) -> HostRow:
        """Makes the row of a new sequence.

        Args:
            tokens: its committed tokens: `TokenView` of a list, or `ArrayTokens`.
            num_prompt_tokens: how many of them are the prompt; None for all.
            sampling: how the engine samples; None is greedy. Speculators draft greedily for a greedy row. `max_tokens`
                bounds drafts; None means up to `max_model_len`.
            num_computed: how many of the first positions have final target states; None for all but the last.

        Raises:
            PluginError: there are `max_num_seqs` rows already.
        """
        if not self._free:
            raise PluginError(f"there are max_num_seqs={self.limits.max_num_seqs} rows already; end one first")
        params = SamplingParams(temperature=0.0, max_tokens=None) if sampling is None else sampling
        row = HostRow(
            number=self._count,
            slot=self._free.pop(),
            view=tokens,
            num_prompt_tokens=len(tokens) if num_prompt_tokens is None else num_prompt_tokens,
            params=attrs.evolve(params, max_tokens=params.max_tokens or self.limits.max_model_len),
            randomness=RowRandomness(self._randomness, self._count, params.seed),
            num_computed=len(tokens) - 1 if num_computed is None else num_computed,
            total=self.stats,
        )
        self._count += 1
        self._rows.add(row)
        return row

    def end(self, row: HostRow, reason: EndReason = "finished") -> None:
        """Ends a row; the speculators that knew it are told at the next call of `propose`."""
        self._rows.discard(row)
        self._chain.end(row, row.slot, reason)
        self._free.append(row.slot)

    def record(
        self,
        captured: Captured,
        rows: Mapping[HostRow, tuple[range, Sequence[int]]],
        drafted: Mapping[HostRow, Sequence[int]] | None = None,
    ) -> None:
        """Receives the target states of a step, before `propose`; for engines that deliver any.

        Args:
            captured: for each boundary that speculators declared [T, hidden], and under `top_ids` and `top_probs`
                [T, top_k].
            rows: the positions of each row that became final in the step, and where they are in these tensors.
            drafted: where the nodes of each row's last draft are, for speculators with `top_k_at_drafts`.
        """
        where = {row.slot: (positions, list(index)) for row, (positions, index) in rows.items()}
        self._states.record(captured, where, {row.slot: index for row, index in (drafted or {}).items()})

    def propose(self, rows: Iterable[HostRow]) -> list[Draft | None]:
        """Asks for drafts; call it after every step, also with no rows, which delivers those that ended.

        Args:
            rows: the rows that the step advanced. One with more than one token to compute is only shown.

        Returns:
            For each row the draft, checked, or None. `HostRow.draft` is the same: if less of it is verified, cut it there.
        """
        self.warm_up()
        rows = list(rows)
        for row in rows:
            row.draft = None
        with own_torch_state():
            if self._proposed_at is not None:
                self._chain.observe(rows, perf_counter() - self._proposed_at, decoding=False)
            self._chain.propose(rows, lambda row, tokens: True, contended=False)
            self._proposed_at = perf_counter()
        for row in rows:
            row.outcome = None
            row.draft = self._fitted(row.draft)
        return [row.draft for row in rows]

    def _fitted(self, draft: Draft | None) -> Draft | None:
        """What the engine verifies of a draft. That does not depend on which tokens were sampled."""
        if draft is None:
            return None
        draft = draft if self.limits.trees else draft.best_chain()
        most = self.limits.max_draft_tokens
        return draft if most is None or len(draft) <= most else draft.keep(range(most))

    def close(self) -> None:
        """Ends all rows and drops the speculators' memory."""
        for speculator in self._chain.speculators:
            if isinstance(speculator.propose, Deadline):
                speculator.propose.close()
        self._rows.clear()
        self._target.close()
