"""The report of `specplug plan`, as text and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from specplug.cli.views.memory import show_budget, show_memory

if TYPE_CHECKING:
    from specplug.cli.terminal import Terminal
    from specplug.config.engine import EngineConfig
    from specplug.engine.memory_plan import MemoryPlan, OtherDevice
    from specplug.engine.planning import PlannedEngine

_INDENT = 22
_NARROW = 60  # columns; on narrower terminals, a value follows its name directly


@attrs.frozen
class PlanReport:
    """A memory plan and its input.

    Attributes:
        config: of the engine.
        plan: of its memory.
        architecture: the class of the target.
        dtype: of the target.
        device: of the target.
        context_length: the number of positions of the target.
        context_note: why it is lower than the model's configuration says; else empty.
        speculators: (method, maximum number of draft tokens of a sequence), in the order of fallback.
        draft_bytes_per_token: bytes of a cached token in the speculators.
        caches_prefixes: whether the engine keeps KV for later requests.
    """

    config: EngineConfig
    plan: MemoryPlan
    architecture: str
    dtype: str
    device: str
    context_length: int
    context_note: str
    speculators: tuple[tuple[str, int], ...]
    draft_bytes_per_token: int
    caches_prefixes: bool = True

    @classmethod
    def of(cls, planned: PlannedEngine) -> PlanReport:
        """Creates the report of a planned engine."""
        return cls(
            config=planned.config,
            plan=planned.plan,
            architecture=planned.architecture.name,
            dtype=str(planned.dtype).removeprefix("torch."),
            device=str(planned.device),
            context_length=planned.architecture.context_length,
            context_note=planned.architecture.context_note,
            speculators=tuple(
                (speculator.method, speculator.traits.max_nodes or speculator.config.num_speculative_tokens)
                for speculator in planned.speculators
            ),
            caches_prefixes=planned.caches_prefixes,
            draft_bytes_per_token=sum(region.bytes_per_token for own in planned.regions for region in own),
        )

    @property
    def target_bytes_per_token(self) -> int:
        """Bytes of a cached token in the target."""
        return self.plan.target_kv // self.plan.num_kv_tokens

    @property
    def _other_rank_bytes(self) -> int:
        """Bytes of each rank after the first, which holds no drafts and verifies none; 0 if there is none."""
        return self.plan.target_weights + self.plan.target_kv if self.config.tensor_parallel_size > 1 else 0

    @property
    def lengths(self) -> list[int]:
        """The sequence lengths for which the capacity is reported: the maximum, and a quarter of it."""
        longest = self.plan.max_model_len
        return sorted({longest, max(longest // 4, 1)}, reverse=True)

    def as_json(self) -> dict[str, Any]:
        """Returns the object of `specplug plan --json`; keys are only added, never removed."""
        plan = self.plan
        return {
            "target": self.config.model,
            "architecture": self.architecture,
            "dtype": self.dtype,
            "quantization": self.config.quantization,
            "device": self.device,
            "speculators": [{"method": method, "max_draft_tokens": count} for method, count in self.speculators],
            "budget_bytes": plan.budget_bytes,
            "total_bytes": plan.total_bytes,
            "left_bytes": plan.budget_bytes - plan.total_bytes,
            "parts": {
                "target_weights": plan.target_weights,
                "target_kv": plan.target_kv,
                "draft_weights": plan.draft_weights,
                "draft_kv": plan.draft_kv,
                "buffers": plan.buffers,
                **({"recurrent_state": plan.recurrent_state} if plan.recurrent_state else {}),
                "adapters": plan.adapters,
                **({"loading": plan.loading} if plan.loading else {}),
            },
            "context_length": self.context_length,
            "max_model_len": plan.max_model_len,
            "max_num_seqs": self.config.max_num_seqs,
            "max_num_batched_tokens": self.config.max_num_batched_tokens,
            "block_size": plan.block_size,
            "num_blocks": plan.num_blocks,
            "tensor_parallel_size": self.config.tensor_parallel_size,
            "other_rank_bytes": self._other_rank_bytes,
            "num_kv_tokens": plan.num_kv_tokens,
            "target_bytes_per_kv_token": self.target_bytes_per_token,
            "draft_bytes_per_kv_token": self.draft_bytes_per_token,
            "scratch_tokens_per_sequence": plan.scratch_tokens_per_row,
            "enable_prefix_caching": self.caches_prefixes,
            "other_devices": [
                {
                    "device": other.device,
                    "budget_bytes": other.budget_bytes,
                    "total_bytes": other.total_bytes(plan.num_kv_tokens),
                }
                for other in plan.elsewhere
            ],
            "sequences": [
                {
                    "tokens": length,
                    "fit_cache": plan.num_sequences(length),
                    "run_at_once": min(plan.num_sequences(length), self.config.max_num_seqs),
                }
                for length in self.lengths
            ],
        }

    def show(self, terminal: Terminal) -> None:
        """Prints the plan, with bars to scale."""
        drafts = [f"{method} ({_count(tokens, 'draft token')})" for method, tokens in self.speculators]
        precision = f"{self.config.quantization} and {self.dtype}" if self.config.quantization else self.dtype
        _row(terminal, "Target", f"{self.config.model}: {self.architecture}, {precision}, on {self.device}")
        _row(terminal, "Speculators", ", then ".join(drafts) or "none: plain decoding")
        if others := self._other_rank_bytes:
            _row(terminal, "Ranks", self._ranks(others))
        terminal.line()
        show_memory(terminal, self.plan)
        terminal.line()
        show_budget(terminal, self.plan)
        terminal.line()
        for name, value in self._cache_rows():
            _row(terminal, name, value)

    def _cache_rows(self) -> list[tuple[str, str]]:
        from specplug.engine.memory_plan import format_bytes

        plan = self.plan
        target, draft = self.target_bytes_per_token, self.draft_bytes_per_token
        both = f" (target {format_bytes(target)}, draft {format_bytes(draft)})" if draft else ""
        if plan.limited_by == "positions":
            limit = f" ({self.context_note})" if self.context_note else ""
        else:
            reason = "max_model_len" if plan.limited_by == "max_model_len" else "what fits the budget"
            limit = f" ({reason}; the target has {self.context_length:,} positions)"
        scratch = "for drafts under verification" if self.speculators else "for the next token"
        return [
            ("KV cache", f"{plan.num_kv_tokens:,} tokens in {plan.num_blocks:,} blocks of {plan.block_size}"),
            ("A cached token", f"{format_bytes(target + draft)}{both}"),
            ("Scratch", f"{_count(plan.scratch_tokens_per_row, 'token')} per sequence, {scratch}"),
            *((f"On {other.device}", f"{self._elsewhere(other)} for drafts") for other in plan.elsewhere),
            ("Prefix cache", self._prefix_caching),
            ("Longest sequence", f"{plan.max_model_len:,} tokens{limit}"),
            *((f"Of {length:,} tokens", self._fitting(plan.num_sequences(length))) for length in self.lengths),
        ]

    @property
    def _prefix_caching(self) -> str:
        if self.config.enable_prefix_caching and not self.caches_prefixes:
            return "off: a cached prefix would lack the target's recurrent state"
        return "on" if self.caches_prefixes else "off"

    def _ranks(self, bytes_of_others: int) -> str:
        from specplug.engine.memory_plan import format_bytes

        size = self.config.tensor_parallel_size
        others = "the other one holds" if size == 2 else f"each of the other {size - 1} holds"
        return (
            f"{size}, with a part of the target each; below is the first one's plan, {others} "
            f"{format_bytes(bytes_of_others)} of target weights and KV cache"
        )

    def _elsewhere(self, other: OtherDevice) -> str:
        from specplug.engine.memory_plan import format_bytes

        return f"{format_bytes(other.total_bytes(self.plan.num_kv_tokens))} of {format_bytes(other.budget_bytes)}"

    def _fitting(self, count: int) -> str:
        limit = self.config.max_num_seqs
        if count <= limit:
            return f"{_count(count, 'sequence')} at once"
        return f"{_count(limit, 'sequence')} at once (max_num_seqs; the cache would hold {count:,})"


def _row(terminal: Terminal, name: str, value: str) -> None:
    if terminal.width is not None and terminal.width < _NARROW:
        terminal.paragraph(f"{name}: {value}", indent="  ")
    else:
        terminal.paragraph(f"{name:<{_INDENT}}{value}", indent=" " * _INDENT)


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
