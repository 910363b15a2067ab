"""The end of the demo: what every method did, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specplug.cli.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from specplug.cli.demo_run import MethodResult
    from specplug.cli.terminal import Terminal

PLAIN = "plain decoding"  # no method's name
_WORTH_SAYING = 1.05
_STYLES = {"yes": "green", "no": "red"}


def heading(terminal: Terminal, text: str) -> None:
    """Begins a part of the demo."""
    terminal.line()
    terminal.line(f"== {text} ==", "bold")


def show_results(terminal: Terminal, results: Mapping[str, MethodResult]) -> bool:
    """Prints the table; returns whether every output is the one of plain decoding."""
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
    heading(terminal, f"Result: {plain.num_tokens} tokens, greedy, float32, one CPU thread")
    header = ("method", "tokens/s", "acceptance length", "target steps", "identical output")
    last = len(header) - 1
    Table(header, rows, right=(1, 2, 3, last)).show(
        terminal, style=lambda row, column: _STYLES.get(rows[row][last], "") if column == last else ""
    )
    terminal.line("Acceptance length: tokens per step with drafts, the target's own included.", "dim")
    for name, result in results.items():
        if result.own_verify:
            terminal.paragraph(f"{name} brings its own verification, which specplug does not check.")
        if result.learns:
            terminal.paragraph(f"{name} learns from requests: each prompt was timed once, when it was new to it.")
        if result.faults:
            terminal.paragraph(f"{name} failed {result.faults} times; its drafts of those steps were lost.")
    return all(identical.values())


def show_ending(terminal: Terminal, results: Mapping[str, MethodResult], all_identical: bool, if_none: str) -> None:
    """Prints what it comes to, and how to have it with another model; `if_none` where no speculator was shown."""
    terminal.line()
    speeds = {name: result.tokens_per_second for name, result in results.items() if name != PLAIN}
    if not speeds:
        terminal.paragraph(if_none)
        return
    best = max(speeds, key=lambda name: speeds[name])
    gain = speeds[best] / results[PLAIN].tokens_per_second
    if not all_identical:
        terminal.paragraph("An output differs from plain decoding's: that is a bug, please report it.", style="red")
    elif gain >= _WORTH_SAYING:
        terminal.paragraph(f"Every output is the same, and {best} is {gain:.1f} times as fast as plain decoding.")
    terminal.line("On your own model:")
    terminal.line('  specplug generate org/model --prompt "..." --stats \\')
    model = ', "model": "org/draft"' if results[best].plan.draft_weights else ""  # one that goes with that target
    terminal.line(f'    --speculative-config \'{{"method": "{best}"{model}}}\'')
