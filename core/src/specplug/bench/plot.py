"""A plot of a comparison: throughput with intervals on the left, acceptance by position on the right."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specplug.bench.contestants import PLAIN
from specplug.bench.report import About
from specplug.bench.summary import Summary
from specplug.errors import ConfigurationError

SUFFIXES = (".png", ".svg", ".pdf")
_INK, _MUTED, _GRID = "#1f2933", "#66707a", "#e3e7eb"
_PLAIN, _PEER = "#9aa5b1", "#cbd2d9"
_COLOURS = ("#2166ac", "#d9822b", "#2a9d6f", "#8e5bb5", "#c0395a", "#4c9bb0", "#8a6d3b", "#5a6b2f")
_MARKERS = "osD^vP*X"
_ROW_INCHES = 0.42
_CAPTION = (
    "Bars: median with 95 % interval; in brackets the paired ratio to plain decoding. Dotted: predicted by the cost model "
    "from the measured acceptance and costs."
)


def check_plot(path: str) -> None:
    """Checks before the measurements that the plot can be written.

    Raises:
        ConfigurationError: the suffix is not supported, or the folder or matplotlib is missing.
    """
    file = Path(path)
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigurationError(f"--plot {path!r}: the name must end in one of {', '.join(SUFFIXES)}")
    if not file.absolute().parent.is_dir():
        raise ConfigurationError(f"--plot {path!r}: there is no folder {str(file.parent)!r}")
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ConfigurationError("--plot needs matplotlib; install it with: pip install 'specplug[bench]'") from error


def save_plot(path: str, about: About, summaries: Sequence[Summary]) -> None:
    """Draws and saves one row of panels for each setting."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys(summary.cell for summary in summaries))
    groups = [[s for s in summaries if s.cell == cell and s.missing is None] for cell in cells]
    labels = list(dict.fromkeys(s.label for s in summaries if s.kind == "method"))
    styles = {label: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, label in enumerate(labels)}
    heights = [max(2.3, 1.2 + _ROW_INCHES * len(group)) for group in groups]
    fonts = {"font.size": 9, "axes.titlesize": 10, "svg.hashsalt": "specplug", "text.color": _INK}
    with matplotlib.rc_context({**fonts, "axes.labelcolor": _INK, "xtick.color": _MUTED, "ytick.color": _INK}):
        figure = Figure(figsize=(10.5, sum(heights) + 0.75), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(cells), 2, squeeze=False, height_ratios=heights, width_ratios=(1.55, 1))
        for cell, group, (left, right) in zip(cells, groups, grid, strict=True):
            _draw_speeds(left, group, styles)
            _draw_acceptance(right, group, styles)
            if len(cells) > 1:
                left.set_title(str(cell), loc="left", fontweight="bold")
        figure.supxlabel(_CAPTION, fontsize=8, color=_MUTED, x=0.01, ha="left")
        figure.suptitle(_title(about, str(cells[0]) if len(cells) == 1 else ""), fontsize=10, x=0.01, ha="left")
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.lower().endswith(".svg") else None)


def _title(about: About, cell: str) -> str:
    setting = f", {cell}" if cell else ""
    first = (
        f"{about.target} · {about.dtype} · {len(about.prompt_tokens)} prompts, {about.max_tokens} tokens each{setting}"
    )
    made = f"{about.repetitions} repetitions · specplug {about.versions['specplug']} · {about.date[:10]}"
    return f"{first}\n{about.where} · {made}"


def _colour(summary: Summary, styles: dict[str, tuple[str, str]]) -> str:
    if summary.label in styles:
        return styles[summary.label][0]
    return _PLAIN if summary.label == PLAIN else _PEER


def _draw_speeds(axes: Any, group: Sequence[Summary], styles: dict[str, tuple[str, str]]) -> None:
    """Draws bars of tokens per second with intervals, the ratio to plain decoding, and the prediction of the cost model."""
    plain = next(s for s in group if s.label == PLAIN)
    assert plain.tokens_per_second is not None
    base = plain.tokens_per_second.median
    largest = 0.0
    for position, summary in enumerate(group):
        speed, ratio = summary.tokens_per_second, summary.ratio
        assert speed is not None
        assert ratio is not None
        axes.barh(position, speed.median, height=0.62, color=_colour(summary, styles), zorder=2)
        spread = [[speed.median - speed.low], [speed.high - speed.median]]
        axes.errorbar(speed.median, position, xerr=spread, color=_INK, capsize=3, linewidth=1.1, zorder=4)
        end = speed.high
        if summary.cost_model is not None:
            promised = base * summary.cost_model.promised.median
            axes.plot(
                [promised] * 2, [position - 0.38, position + 0.38], color=_INK, linewidth=1.6, linestyle=":", zorder=5
            )
            end = max(end, promised)
        text = f"  {speed.median:,.0f}" + ("" if summary is plain else f"  ({ratio.median:.2f} x)")
        axes.text(end, position, text, va="center", ha="left", fontsize=9, zorder=6)
        largest = max(largest, end)
    axes.axvline(base, color=_MUTED, linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(group)), [summary.label for summary in group])
    axes.set_ylim(len(group) - 0.4, -0.6)
    axes.set_xlim(0, largest * 1.24)
    axes.set_xlabel("tokens per second, prompts included")
    axes.grid(axis="x", color=_GRID, zorder=0)
    _clean(axes, ("top", "right", "left"))
    axes.tick_params(axis="y", length=0)


def _draw_acceptance(axes: Any, group: Sequence[Summary], styles: dict[str, tuple[str, str]]) -> None:
    """Draws the share of drafts that were accepted at least up to each position."""
    drawn = [summary for summary in group if summary.by_position]
    if not drawn:
        axes.text(0.5, 0.5, "no drafts", ha="center", va="center", color=_MUTED, transform=axes.transAxes)
        axes.set_axis_off()
        return
    for summary in drawn:
        colour, marker = styles[summary.label]
        positions = range(1, len(summary.by_position) + 1)
        shares = [100 * share for share in summary.by_position]
        length = f"{summary.label} (τ = {summary.acceptance_length:.2f})"
        axes.plot(positions, shares, color=colour, marker=marker, markersize=5, linewidth=1.8, label=length, zorder=3)
    longest = max(len(summary.by_position) for summary in drawn)
    axes.set_xticks(range(1, longest + 1, 1 + longest // 12))
    axes.set_xlim(0.7, longest + 0.3)
    axes.set_ylim(0, 102)
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.set_xlabel("position in the draft")
    axes.set_title("drafts accepted at least up to this position", loc="left", color=_MUTED, fontsize=9)
    axes.grid(color=_GRID, zorder=0)
    axes.legend(fontsize=8, frameon=False, loc="best")
    _clean(axes, ("top", "right"))


def _clean(axes: Any, sides: Sequence[str]) -> None:
    for side in sides:
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_MUTED)
