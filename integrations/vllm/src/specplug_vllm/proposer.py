"""The class that vLLM calls for drafts (`method: custom_class`)."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import torch

from specplug import ConfigurationError, SamplingParams
from specplug.host import ArrayTokens, Draft, HostLimits, HostRow, SpeculatorHost
from specplug_vllm.counters import CounterFile
from specplug_vllm.settings import HOST_KEY, WORKER, HostSettings, speculative_config
from specplug_vllm.states import RowSpan, TargetStep, check_states, check_target, dense_probs
from specplug_vllm.target import VllmTarget
from specplug_vllm.versions import WRONG_SAMPLES, check_vllm

logger = logging.getLogger("specplug")
MAX_SEED = 2**63
_GREEDY = 1e-5
"""vLLM samples greedily below this temperature."""


@attrs.define(eq=False)
class _Known:
    """A request that speculators know.

    Attributes:
        row: its row.
        tokens: what its row's view is of: vLLM's array, or a copy of its own that stays after vLLM reused its place.
        last: its last token.
    """

    row: HostRow
    tokens: ArrayTokens
    last: int
    copy: array[int] | None = None


class SpecplugProposer:
    """Runs specplug's speculators for vLLM; vLLM makes it, from `speculative_config.model`.

    vLLM calls `propose` after every step with the tokens of all rows, in its own arrays. Requests are told apart by the names
    that its runner knows. What a speculator does wrong costs its drafts and no more.

    Args:
        vllm_config: vLLM's. Its `additional_config["specplug"]` is the speculative configuration.

    Raises:
        SpecplugError: there is no vLLM, or one that was not checked; the configuration is wrong; or a speculator needs what
            vLLM does not give.
    """

    def __init__(self, vllm_config: Any) -> None:
        check_vllm()
        speculative = vllm_config.speculative_config
        additional = vllm_config.additional_config
        if vllm_config.device_config.device_type == "cpu":
            logger.warning(WRONG_SAMPLES)
        self.num_speculative_tokens: int = speculative.num_speculative_tokens
        config = speculative_config(additional, self.num_speculative_tokens)
        settings = HostSettings.parse(additional.get(HOST_KEY, {}))
        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        self.target = VllmTarget.of(vllm_config)
        limits = HostLimits(
            vocab_size=self.target.vocab_size,
            max_model_len=model.max_model_len,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs),
            max_draft_tokens=self.num_speculative_tokens,
            num_layers=self.target.num_layers,
            memory_bytes=settings.memory_bytes,
        )
        self.host = SpeculatorHost(
            config,
            limits,
            target=self.target,
            plugins=settings.imported_plugins(),
            allowed=settings.allowed,
            denied=settings.denied,
            strict=settings.strict,
            timeout=settings.timeout,
            seed=model.seed or 0,
        )
        traits = [each.traits for each in self.host.speculators]
        check_states(vllm_config, self.host.speculators)
        self._boundaries = list(dict.fromkeys(boundary for trait in traits for boundary in trait.hidden_states))
        self._top_k = max(trait.top_k for trait in traits)
        self._delivers = any(trait.needs_states for trait in traits)
        self._samples = vllm_config.parallel_config.worker_cls == WORKER
        self._keeps_copies = not all(trait.token_only for trait in traits)
        self._step: TargetStep | None = None
        self._draft_probs: torch.Tensor | None = None
        self._runner: Any = None
        self._known: dict[str, _Known] = {}
        self._counters = CounterFile.create(vllm_config, [s.method for s in self.host.speculators])

    def attach_runner(self, runner: Any) -> None:
        """Receives vLLM's model runner, from `plugin.register`."""
        self._runner = runner

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """The boundaries that the target delivers, ascending, as vLLM does."""
        return tuple(sorted(boundary for boundary in self._boundaries if boundary != "final"))

    def receive(self, step: TargetStep) -> None:
        """Receives the target's states from `Worker`'s model runner, before `propose`."""
        self._step = step if self._delivers else None

    def take_draft_probs(self) -> torch.Tensor | None:
        """What the last drafts were sampled from, for `Worker`'s model runner; see `dense_probs`."""
        probs, self._draft_probs = self._draft_probs, None
        return probs

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Called once vLLM has loaded the target: loads the speculators' weights, which vLLM then counts as the model's.

        Raises:
            ConfigurationError: vLLM did not load this package's plugin.
        """
        if self._runner is None:
            raise ConfigurationError(
                "vLLM did not load the plugin 'specplug' of vllm.general_plugins, which tells requests apart; add it to "
                "VLLM_PLUGINS, or unset that"
            )
        check_target(target_model, self.aux_layers)
        self.target.attach_model(target_model)
        self.host.warm_up()

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray[Any, Any],
        token_ids_cpu: np.ndarray[Any, Any],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Called after every step.

        Args:
            sampled_token_ids: for each row what the step added; nothing while its prompt is computed.
            num_tokens_no_spec: for each row how many tokens it has now.
            token_ids_cpu: [rows, max_model_len]: these tokens.
            slot_mappings: not used.

        Returns:
            For each row its draft, at most `num_speculative_tokens` long.
        """
        names: list[str] = list(self._runner.input_batch.req_ids[: len(sampled_token_ids)])
        spans = self._spans(names, sampled_token_ids)
        self._end_others(names)
        rows = {
            place: self._updated(name, new, token_ids_cpu[place], int(num_tokens_no_spec[place]), span)
            for place, (name, new, span) in enumerate(zip(names, sampled_token_ids, spans, strict=True))
            if new or span is not None
        }
        self._record(rows, spans)
        found: list[Draft | None] = [None] * len(names)
        for place, draft in zip(rows, self.host.propose(rows.values()), strict=True):
            if sampled_token_ids[place]:
                found[place] = draft
            else:
                rows[place].draft = None  # its prompt is not computed yet
        if self._samples:
            self._draft_probs = dense_probs(found, self.target.vocab_size, self.target.device)
        if self._counters is not None:
            self._counters.write(self.host)
        return [[] if draft is None else draft.tokens for draft in found]

    def _spans(self, names: Sequence[str], sampled: Sequence[Sequence[int]]) -> Sequence[RowSpan | None]:
        """Where each request's part of the target's step is; None without target states."""
        if self._step is None:
            return [None] * len(names)
        computed = self._runner.input_batch.num_computed_tokens_cpu[: len(names)].tolist()
        return self._step.spans(names, sampled, computed)

    def _record(self, rows: dict[int, HostRow], spans: Sequence[RowSpan | None]) -> None:
        """Stores the states of the step for the speculators."""
        step, self._step = self._step, None
        if step is None:
            return
        own = {row: span for place, row in rows.items() if (span := spans[place]) is not None}
        self.host.record(
            step.captured(self._boundaries, self._top_k, self.target.logits),
            {row: (span.positions, span.index) for row, span in own.items()},
            {row: span.nodes for row, span in own.items()},
        )

    def known_rows(self) -> dict[str, HostRow]:
        """The rows of the requests that speculators know, by request."""
        return {name: known.row for name, known in self._known.items()}

    def _end_others(self, names: Sequence[str]) -> None:
        """Ends the rows of requests that are not in the batch any more."""
        present = set(names)
        for name in [name for name in self._known if name not in present]:
            self._end(name, is_waiting=name in self._runner.requests)

    def _end(self, name: str, *, is_waiting: bool) -> None:
        known = self._known.pop(name)
        if known.copy is None:
            known.tokens.point_to(array("i"), 0)  # vLLM has given its place to another request
        self.host.end(known.row, "preempted" if is_waiting else "finished")

    def _updated(
        self, name: str, new: Sequence[int], tokens: np.ndarray[Any, Any], length: int, span: RowSpan | None
    ) -> HostRow:
        """The row of a request, with the tokens that it has now."""
        known = self._known.get(name)
        if known is not None and not self._continues(known, tokens, length):
            self._end(name, is_waiting=False)
            known = None
        computed = None if span is None else span.positions.stop
        if known is None:
            known = self._known[name] = self._new(name, tokens, length, computed)
            return known.row
        row, before = known.row, len(known.tokens)
        if known.copy is None:
            known.tokens.point_to(tokens, length)
        else:
            known.copy.extend(tokens[before:length].tolist())
        known.last = int(tokens[length - 1])
        if not new:  # a part of its prompt was computed
            row.num_computed = length - 1 if computed is None else computed
            return row
        if length - before != len(new):  # vLLM made a step without asking for drafts
            row.draft = None
        if row.draft is not None and span is not None and len(span.nodes) < len(row.draft):  # it verified less
            row.draft = row.draft.keep(range(len(span.nodes))) if span.nodes else None
        accepted = 0 if row.draft is None else min(len(new) - 1, len(row.draft))
        row.advance(length, accepted, num_computed=computed)
        return row

    @staticmethod
    def _continues(known: _Known, tokens: np.ndarray[Any, Any], length: int) -> bool:
        """Whether the tokens of a request are those that are known, and perhaps more."""
        before = len(known.tokens)
        return before <= length and int(tokens[before - 1]) == known.last

    def _new(self, name: str, tokens: np.ndarray[Any, Any], length: int, computed: int | None) -> _Known:
        request = self._runner.requests[name]
        copy = array("i", tokens[:length].tolist()) if self._keeps_copies else None
        view = ArrayTokens(tokens if copy is None else copy, length)
        row = self.host.add(
            view,
            num_prompt_tokens=min(request.num_prompt_tokens, length),
            sampling=_sampling(request.sampling_params, self._samples),
            num_computed=computed,
        )
        return _Known(row, view, int(tokens[length - 1]), copy)


def _sampling(params: Any, samples: bool) -> SamplingParams:
    """What speculators are told of a request's sampling.

    Without `Worker`, vLLM takes drafts for certain, and a sampled one would be accepted less often than the most likely one:
    then all rows are greedy. So are those whose drafts vLLM cuts where a grammar forbids a token, which must not depend on
    what was sampled.
    """
    if params is None or not samples or params.temperature < _GREEDY or params.structured_outputs is not None:
        return SamplingParams(temperature=0.0, max_tokens=None if params is None else params.max_tokens)
    return SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=None if params.seed is None else params.seed % MAX_SEED,
        max_tokens=params.max_tokens,
    )
