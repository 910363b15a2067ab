"""The results of `specplug demo`: a table of all methods."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import attrs

from specplug.cli.views.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from specplug.cli.terminal import Terminal
    from specplug.cli.views.stats import Meter
    from specplug.engine.memory_plan import MemoryPlan

PLAIN = "plain decoding"  # not a valid method name
_MIN_GAIN = 1.05
_STYLES = {"yes": "green", "no": "red"}


@attrs.define
class MethodResult:
    """The results of one method over all prompts.

    Attributes:
        plan: its memory plan.
        outputs: the token ids for each prompt.
        repeatable: whether every repetition generated the same tokens.
        num_tokens: total generated tokens, once per prompt.
        num_steps: target forwards for them.
        num_spec_steps: target forwards that verified a draft.
        num_accepted: accepted draft tokens.
        num_decoded: tokens after the first piece of each prompt.
        decode_seconds: their time, the median of the repetitions.
        own_verify: whether the method has its own verification rule.
        faults: failures of its speculator.
        learns: whether it learns from requests; each prompt is then measured once, when it is new.
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
        """Tokens per step that verified a draft, the bonus token included; None without drafts."""
        return 1 + self.num_accepted / self.num_spec_steps if self.num_spec_steps else None

    def add(self, meters: Sequence[Meter]) -> None:
        """Adds the repetitions of one prompt."""
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


def show_heading(terminal: Terminal, text: str) -> None:
    """Prints the heading of a part of the demo."""
    terminal.line()
    terminal.line(f"== {text} ==", "bold")


def show_results(terminal: Terminal, results: Mapping[str, MethodResult]) -> bool:
    """Prints the table; returns whether every output is identical to that of plain decoding."""
    plain = results[PLAIN]
    identical = {name: result.repeatable and result.outputs == plain.outputs for name, result in results.items()}
    rows = []
    for name, result in results.items():
        length = result.acceptance_length
        rows.append(
            (
                name,
                f"{result.tokens_per_second:.0f} ({result.tokens_per_second / plain.tokens_per_second:.1f}x)",
                "-" if length is None else f"{length:.2f}",
                str(result.num_steps),
                ("-" if name == PLAIN else "yes") if identical[name] else "no",
            )
        )
    show_heading(terminal, f"Result: {plain.num_tokens} tokens, greedy, float32, one CPU thread")
    header = ("method", "tokens/s", "acceptance length", "target steps", "identical output")
    last = len(header) - 1
    Table(header, rows, right=(1, 2, 3, last)).show(
        terminal, style=lambda row, column: _STYLES.get(rows[row][last], "") if column == last else ""
    )
    terminal.line("Acceptance length: tokens per step with a draft, the bonus token included.", "dim")
    for name, result in results.items():
        if result.own_verify:
            terminal.paragraph(f"{name} has its own verification, which specplug does not check.")
        if result.learns:
            terminal.paragraph(f"{name} learns from requests: each prompt was measured once, when it was new.")
        if result.faults:
            terminal.paragraph(f"{name} failed {result.faults} times; its drafts of those steps were lost.")
    return all(identical.values())


def show_ending(terminal: Terminal, results: Mapping[str, MethodResult], all_identical: bool, if_none: str) -> None:
    """Prints the conclusion and a command for another model; only `if_none` if no speculator was shown."""
    terminal.line()
    speeds = {name: result.tokens_per_second for name, result in results.items() if name != PLAIN}
    if not speeds:
        terminal.paragraph(if_none)
        return
    best = max(speeds, key=lambda name: speeds[name])
    gain = speeds[best] / results[PLAIN].tokens_per_second
    if not all_identical:
        terminal.paragraph(
            "An output differs from that of plain decoding. This is a bug; please report it.", style="red"
        )
    elif gain >= _MIN_GAIN:
        terminal.paragraph(f"All outputs are identical, and {best} is {gain:.1f} times as fast as plain decoding.")
    terminal.line("On your own model:")
    terminal.line('  specplug generate org/model --prompt "..." --stats \\')
    model = ', "model": "org/draft"' if results[best].plan.draft_weights else ""  # a draft model for that target
    terminal.line(f'    --speculative-config \'{{"method": "{best}"{model}}}\'')
