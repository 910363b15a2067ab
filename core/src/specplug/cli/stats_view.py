"""`--stats`: speed and acceptance."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specplug.cli.meter import Meter
    from specplug.cli.terminal import Terminal
    from specplug.llm import LLM
    from specplug.outputs import RequestOutput
    from specplug.stats import SpeculationStats

Rows = list[tuple[str, str]]


def show_meter(terminal: Terminal, meter: Meter, llm: LLM) -> None:
    """What one streamed completion took."""
    metrics = meter.metrics
    assert metrics is not None
    rate = "" if meter.tokens_per_second is None else f", then {meter.tokens_per_second:.1f} tokens/s"
    rows = [
        ("tokens", f"{len(meter.token_ids)} (ended by {meter.finish_reason})"),
        ("speed", f"first token after {meter.seconds_to_first:.3f} s{rate}"),
    ]
    _show(terminal, rows + _speculation(metrics, llm, metrics.num_steps, "steps"))


def show_totals(terminal: Terminal, outputs: Sequence[RequestOutput], seconds: float, llm: LLM) -> None:
    """What several requests took together."""
    completions = [completion for output in outputs for completion in output.outputs]
    tokens = sum(len(completion.token_ids) for completion in completions)
    rows = [
        ("prompts", f"{len(outputs)}, {len(completions)} completions"),
        ("tokens", f"{tokens}"),
        ("speed", f"{tokens / seconds:.1f} tokens/s over {seconds:.3f} s, prompts included"),
    ]
    _show(terminal, rows + _speculation(llm.engine.stats, llm, llm.engine.num_steps, "steps of a sequence"))


def _speculation(stats: SpeculationStats, llm: LLM, num_forwards: int, steps: str) -> Rows:
    rows = [("target steps", f"{num_forwards}")]
    if stats.mean_acceptance_length is not None:
        explained = f"tokens per step that verified a draft, in {stats.num_spec_steps} of {stats.num_steps} {steps}"
        rows.append(("acceptance length", f"{stats.mean_acceptance_length:.2f} {explained}"))
    faults = llm.engine.faults
    for method in llm.engine.methods:
        counts = stats.by_method.get(method)
        drafted = counts.num_draft_tokens if counts else 0
        accepted = counts.num_accepted_draft_tokens if counts else 0
        share = f" ({accepted / drafted:.0%})" if drafted else ""
        notes = f"; it failed {faults[method]} times" if faults[method] else ""
        if method in llm.engine.unverified_methods:
            notes += "; verified by its own rule, which specplug does not check"
        rows.append((method, f"{accepted} accepted of {drafted} drafted{share}{notes}"))
    return rows


def _show(terminal: Terminal, rows: Rows) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        terminal.paragraph(f"{name:<{width}}  {value}", indent=" " * (width + 2))
