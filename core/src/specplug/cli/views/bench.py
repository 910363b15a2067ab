"""The tables of `specplug bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specplug.cli.views.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specplug.bench.report import About
    from specplug.bench.summary import Summary
    from specplug.cli.terminal import Terminal

_NONE = "-"
_FASTER, _SLOWER = 1.02, 0.98
_RATIO_COLUMN = 2
_LEGEND = (
    "x plain: throughput versus plain decoding, prompts included; the median of {repetitions} paired repetitions{interval}.",
    "first token, next token: milliseconds, p50 and p99; tokens that arrive together share the time since the previous ones.",
    "accepted: tokens per step that verified a draft, the bonus token included; by position: the share of drafts of which at "
    "least the first 1, 2, ... tokens were accepted.",
)
_COST_LEGEND = (
    "ms per step in which all sequences decode. predicted: tokens/step x the forward in plain decoding, divided by forward + "
    "drafting (Leviathan et al., 2211.17192). measured: the speed of the same steps as a ratio to plain decoding.",
)


def show_comparison(terminal: Terminal, about: About, summaries: Sequence[Summary]) -> None:
    """Prints two tables for each setting: speed, and the costs of a step."""
    prompts = f"{len(about.prompt_tokens)} prompts of {min(about.prompt_tokens)} to {max(about.prompt_tokens)} tokens"
    terminal.paragraph(
        f"{about.target}, {about.dtype}, {about.where}; {prompts}, {about.max_tokens} tokens generated for each",
        style="dim",
    )
    for cell in dict.fromkeys(summary.cell for summary in summaries):
        group = [summary for summary in summaries if summary.cell == cell]
        terminal.line()
        terminal.line(f"== {cell} ==", "bold")
        _show_speeds(terminal, group)
        _show_costs(terminal, group)
        for summary in group:
            _show_notes(terminal, summary, about.dtype)
    terminal.line()
    interval = ", with its 95 % bootstrap interval" if about.repetitions > 1 else " (an interval needs more than one)"
    legend = [line.format(repetitions=about.repetitions, interval=interval) for line in _LEGEND]
    for line in [*legend, *(_COST_LEGEND if any(summary.cost_model for summary in summaries) else ())]:
        terminal.paragraph(line, style="dim")


def _show_speeds(terminal: Terminal, group: Sequence[Summary]) -> None:
    header = (
        "method",
        "tokens/s",
        "x plain",
        "95 % interval",
        "first token",
        "next token",
        "accepted",
        "by position",
    )

    def style(row: int, column: int) -> str:
        ratio = group[row].ratio
        if column != _RATIO_COLUMN or ratio is None or group[row].kind == "plain":
            return "dim" if group[row].missing else ""
        return "green" if ratio.low > _FASTER else "red" if ratio.high < _SLOWER else ""

    Table(header, [_speed_row(summary) for summary in group], right=(1, 2, 3, 4, 5, 6)).show(terminal, style=style)


def _speed_row(summary: Summary) -> tuple[str, ...]:
    speed, ratio = summary.tokens_per_second, summary.ratio
    if speed is None or ratio is None:
        return (summary.label, *["n/a"] * 6, summary.missing or "")
    length = _NONE if summary.acceptance_length is None else f"{summary.acceptance_length:.2f}"
    shares = " ".join(f"{share:.0%}" for share in summary.by_position)
    is_plain = summary.kind == "plain"
    return (
        summary.label,
        f"{speed.median:,.1f}",
        f"{ratio.median:.2f}",
        _NONE if is_plain else f"{ratio.low:.2f} to {ratio.high:.2f}",
        _milliseconds(summary.first_token),
        _milliseconds(summary.token),
        length,
        shares,
    )


def _milliseconds(quantiles: tuple[float | None, float | None]) -> str:
    low, high = quantiles
    return _NONE if low is None or high is None else f"{low * 1e3:.1f} / {high * 1e3:.1f}"


def _show_costs(terminal: Terminal, group: Sequence[Summary]) -> None:
    rows = []
    for summary in group:
        model = summary.cost_model
        if model is not None:
            rows.append(
                (
                    summary.label,
                    f"{model.tokens_per_step:.2f}",
                    f"{model.verify_seconds * 1e3:.2f} ({model.plain_seconds * 1e3:.2f})",
                    f"{model.draft_seconds * 1e3:.2f}",
                    f"{model.other_seconds * 1e3:.2f}",
                    f"{model.predicted.median:.2f}",
                    f"{model.measured.median:.2f}",
                    f"{model.of_predicted.median:.0%}",
                )
            )
    if rows:
        terminal.line()
        header = (
            "decoding",
            "tokens/step",
            "forward (plain)",
            "drafting",
            "other",
            "predicted",
            "measured",
            "of predicted",
        )
        Table(header, rows, right=range(1, len(header))).show(terminal)


def _show_notes(terminal: Terminal, summary: Summary, dtype: str) -> None:
    """Prints what a reader of the figures must know."""
    for method in summary.unverified_methods:
        terminal.paragraph(f"{method} verifies by a rule of its own, which specplug does not check.")
    if summary.learns:
        terminal.paragraph(
            f"{summary.label} learns from requests: every run used a new engine, warmed up on random tokens.",
            style="dim",
        )
    if summary.faults:
        terminal.paragraph(
            f"{summary.label} failed {summary.faults} times; its drafts of those steps were lost.", style="red"
        )
    if summary.kind == "method" and summary.same_outputs and summary.same_outputs[0] < summary.same_outputs[1]:
        same, total = summary.same_outputs
        terminal.paragraph(
            f"{summary.label}: {same} of {total} outputs are identical to plain decoding, in {dtype}.", style="dim"
        )
