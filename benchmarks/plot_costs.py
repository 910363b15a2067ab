"""Draw what benchmarks/speculation_costs.py measured: speed-up, cost model and Leviathan's formula over γ.

pip install matplotlib
python benchmarks/plot_costs.py build/costs-tiny.json build/costs-256m.json --out docs/images/draft-model.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

LINES = (
    ("speed_up", "measured", {"color": "#1a5fb4", "marker": "o", "linewidth": 2.2}),
    ("cost_model", "τ·t₁ / (t_verify + t_draft)", {"color": "#26a269", "linestyle": "--"}),
    ("leviathan", "(1−α^(γ+1)) / ((1−α)(γc+1))", {"color": "#c64600", "linestyle": ":"}),
)


def panel(axes: Any, measured: dict[str, Any], title: str) -> None:
    """One target."""
    rows = measured["rows"]
    gammas = [row["gamma"] for row in rows]
    for key, label, style in LINES:
        axes.plot(gammas, [row[key] for row in rows], label=label, **style)
    axes.axhline(1, color="#888888", linewidth=0.8)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("γ, draft tokens a step")
    axes.set_xticks(gammas)
    axes.grid(alpha=0.25)
    lengths = axes.twinx()
    lengths.plot(gammas, [row["tau"] for row in rows], color="#813d9c", alpha=0.6, marker=".", label="τ (right)")
    lengths.set_ylabel("τ", color="#813d9c", rotation=0)
    lengths.set_ylim(1, None)
    lengths.tick_params(axis="y", colors="#813d9c")
    axes.set_ylim(0, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, nargs="+")
    parser.add_argument("--titles", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pyplot.rcParams["svg.hashsalt"] = "specplug"
    titles = args.titles or [path.stem for path in args.measured]
    figure, panels = pyplot.subplots(1, len(args.measured), figsize=(5.2 * len(args.measured), 3.6), squeeze=False)
    for axes, path, title in zip(panels[0], args.measured, titles, strict=True):
        panel(axes, json.loads(path.read_text()), title)
    panels[0][0].set_ylabel("speed-up over plain decoding")
    panels[0][0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
