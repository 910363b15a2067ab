"""One method's part of the demo: start, show, time."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import attrs

from specplug.cli.memory_view import show_memory
from specplug.cli.meter import Meter
from specplug.cli.startup_view import StartupView
from specplug.cli.text_view import TextView

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specplug.cli.demo_prompts import DemoPrompt
    from specplug.cli.terminal import Terminal
    from specplug.engine.memory_plan import MemoryPlan
    from specplug.llm import LLM

_REPETITIONS = 3
_SECONDS_PER_PROMPT = 3.0
_WARM_UP = "1 2 3"
_TARGET_OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "max_num_seqs": 4,
    "max_model_len": 512,
    "max_num_batched_tokens": 256,
}


@attrs.define
class MethodResult:
    """What one method did with all prompts.

    Attributes:
        plan: the memory it was given.
        outputs: the token ids of each prompt.
        repeatable: whether every repetition gave the same tokens.
        num_tokens: generated in all, once per prompt.
        num_steps: target forwards that took.
        num_spec_steps: those that verified a draft.
        num_accepted: draft tokens that were kept.
        num_decoded: tokens after each prompt's first piece.
        decode_seconds: the time these took, the median of the repetitions.
        own_verify: whether the method brought its own verification rule.
        faults: how often its speculator failed.
        learns: whether it learns from requests, so that each prompt was timed once, when it was new to it.
    """

    plan: MemoryPlan
    outputs: list[list[int]] = attrs.field(factory=list)
    repeatable: bool = True
    num_tokens: int = 0
    num_steps: int = 0
    num_spec_steps: int = 0
    num_accepted: int = 0
    num_decoded: int = 0
    decode_seconds: float = 0.0
    own_verify: bool = False
    faults: int = 0
    learns: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed over all prompts."""
        return self.num_decoded / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per step that verified a draft, the target's own included; None without drafts."""
        return 1 + self.num_accepted / self.num_spec_steps if self.num_spec_steps else None

    def add(self, meters: Sequence[Meter]) -> None:
        """Counts one prompt's repetitions."""
        first = meters[0]
        assert first.metrics is not None
        self.outputs.append(first.token_ids)
        self.repeatable &= all(meter.token_ids == first.token_ids for meter in meters)
        self.num_tokens += len(first.token_ids)
        self.num_steps += first.metrics.num_steps
        self.num_spec_steps += first.metrics.num_spec_steps
        self.num_accepted += first.metrics.num_accepted_draft_tokens
        self.num_decoded += first.num_decoded
        self.decode_seconds += statistics.median(meter.decode_seconds for meter in meters)


def run_method(
    terminal: Terminal,
    prompts: Sequence[DemoPrompt],
    speculative_config: dict[str, Any] | None,
    earlier: MemoryPlan | None = None,
) -> MethodResult:
    """Starts the embedded target with one method, streams every prompt, and times it.

    Args:
        terminal: where everything is shown.
        prompts: what to continue.
        speculative_config: the method; None for plain decoding.
        earlier: a memory plan that was shown before, and is not drawn again.

    Raises:
        SpecplugError: the engine does not start with this method.
    """
    from specplug.llm import LLM
    from specplug.sampling.params import SamplingParams

    with StartupView(terminal) as view:
        alone = (speculative_config["method"],) if speculative_config else ()
        llm = LLM("tiny", speculative_config=speculative_config, allowed_plugins=alone, on_step=view, **_TARGET_OPTIONS)
    with llm:
        terminal.line()
        if llm.engine.plan.parts != (earlier and earlier.parts):
            show_memory(terminal, llm.engine.plan)
        else:
            terminal.line("Memory plan: as above; this speculator holds no memory of its own.")
        result = MethodResult(llm.engine.plan)
        result.learns = llm.engine.learns
        _measure(llm, _WARM_UP, SamplingParams(temperature=0.0, max_tokens=8))
        methods = llm.engine.methods
        if legend := TextView(terminal, methods).legend:
            terminal.line()
            terminal.paragraph(f"Text in {legend}.", style="dim")
        for number, prompt in enumerate(prompts, start=1):
            terminal.line()
            terminal.paragraph(f"Prompt {number}: {prompt.title}", style="bold")
            params = SamplingParams(temperature=0.0, max_tokens=prompt.max_tokens)
            text = TextView(terminal, methods, indent="  | ")
            if prompt.is_shown:
                text.prompt(prompt.text)
            shown = _measure(llm, prompt.text, params, text)
            meters = [shown] if result.learns else _repeat(llm, prompt.text, params)
            result.add(meters)
            terminal.paragraph(f"  {_describe(meters)}", indent="  ", style="dim")
        result.own_verify = bool(llm.engine.unverified_methods)
        result.faults = sum(llm.engine.faults.values())
    return result


def _repeat(llm: LLM, prompt: str, params: Any) -> list[Meter]:
    """Times a prompt a few times; on a slow machine less often."""
    deadline = time.perf_counter() + _SECONDS_PER_PROMPT
    meters: list[Meter] = []
    while len(meters) < _REPETITIONS and (not meters or time.perf_counter() < deadline):
        meters.append(_measure(llm, prompt, params))
    return meters


def _measure(llm: LLM, prompt: str, params: Any, text: TextView | None = None) -> Meter:
    meter = Meter()
    try:
        for piece in llm.stream(prompt, params):
            meter.add(piece)
            if text is not None:
                text.show(piece)
    finally:
        if text is not None:
            text.close()
    return meter


def _describe(meters: Sequence[Meter]) -> str:
    first = meters[0]
    metrics = first.metrics
    assert metrics is not None
    rates = [meter.tokens_per_second for meter in meters if meter.tokens_per_second is not None]
    speed = f", {statistics.median(rates):.0f} tokens/s" if rates else ""
    drafts = ""
    if metrics.num_draft_tokens:
        drafts = f", {metrics.num_accepted_draft_tokens} of {metrics.num_draft_tokens} draft tokens accepted"
    return f"{len(first.token_ids)} tokens in {metrics.num_steps} target steps{drafts}{speed}"
