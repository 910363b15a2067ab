"""Runs `specplug demo`: starts each method, shows its output, and measures its speed."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import TYPE_CHECKING, Any

import attrs

from specplug.cli.error_text import describe_error
from specplug.cli.process import import_libraries
from specplug.cli.run.demo_prompts import PROMPTS, DemoPrompt
from specplug.cli.views.demo import PLAIN, MethodResult, show_heading
from specplug.cli.views.memory import show_memory
from specplug.cli.views.startup import StartupView
from specplug.cli.views.stats import Meter
from specplug.cli.views.text import TextView

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from specplug.cli.terminal import Terminal
    from specplug.engine.memory_plan import MemoryPlan
    from specplug.llm import LLM
    from specplug.plugins.finder import PluginRecord

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


def run_demo(
    terminal: Terminal,
    records: Sequence[PluginRecord],
    max_tokens: int | None,
    num_speculative_tokens: int,
    *,
    skip_failed: bool,
) -> dict[str, MethodResult]:
    """Runs plain decoding, then every method.

    Args:
        terminal: shows everything.
        records: the plugins.
        max_tokens: the maximum number of tokens of each output; None for the length of each prompt.
        num_speculative_tokens: the draft length.
        skip_failed: report and leave out a method that does not start, instead of raising its error.
    """
    started = time.perf_counter()
    terminal.write("Importing PyTorch and Transformers ... ")
    import_libraries()
    terminal.line(f"{time.perf_counter() - started:.1f} s")
    prompts = [attrs.evolve(p, max_tokens=min(p.max_tokens, max_tokens or p.max_tokens)) for p in PROMPTS]
    with _one_thread():
        show_heading(terminal, "Plain decoding: the embedded model tiny alone")
        results = {PLAIN: run_method(terminal, prompts, None)}
        for record in records:
            if record.status != "ok":
                terminal.line()
                terminal.paragraph(
                    f"{record.method} of {record.distribution} is left out: {record.status}, {record.reason}"
                )
                continue
            show_heading(terminal, f"Speculator {record.method}: package {record.distribution} {record.version}")
            config = {"method": record.method, "num_speculative_tokens": num_speculative_tokens}
            try:
                results[record.method] = run_method(terminal, prompts, config, results[PLAIN].plan)
            except Exception as error:
                if not skip_failed:
                    raise
                terminal.paragraph(f"  {record.method} is left out: {describe_error(error)}", indent="  ")
    return results


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Uses one thread: the embedded model is too small for more, and times vary less on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_method(
    terminal: Terminal,
    prompts: Sequence[DemoPrompt],
    speculative_config: dict[str, Any] | None,
    shown: MemoryPlan | None = None,
) -> MethodResult:
    """Starts the embedded target with one method, then streams and times every prompt.

    Args:
        terminal: shows everything.
        prompts: to continue.
        speculative_config: the method; None for plain decoding.
        shown: a memory plan that was already shown, and is not drawn again.

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
        if llm.engine.plan.parts != (shown and shown.parts):
            show_memory(terminal, llm.engine.plan)
        else:
            terminal.line("Memory plan: as above; this speculator needs no memory of its own.")
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
            first = _measure(llm, prompt.text, params, text)
            meters = [first] if result.learns else _repeat(llm, prompt.text, params)
            result.add(meters)
            terminal.paragraph(f"  {_describe(meters)}", indent="  ", style="dim")
        result.own_verify = bool(llm.engine.unverified_methods)
        result.faults = sum(llm.engine.faults.values())
    return result


def _repeat(llm: LLM, prompt: str, params: Any) -> list[Meter]:
    """Measures a prompt several times; fewer on a slow machine."""
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
