"""Draw what benchmarks/never_slower.py measured: useless drafts against plain decoding, good ones against the best length.

pip install matplotlib
python benchmarks/plot_never_slower.py build/never-slower.json --out docs/images/never-slower.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

COLORS = {"ngram": "#1a5fb4", "draft_model": "#26a269", "eagle3": "#813d9c"}


def panel(axes: Any, rows: list[dict[str, Any]], key: str, title: str, label: str) -> None:
    """Means with their intervals, one column for each method, batch and workload."""
    columns = sorted({(row["workload"], row["batch"]) for row in rows})
    methods = [method for method in COLORS if any(row["method"] == method for row in rows)]
    for place, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method]
        at = [columns.index((row["workload"], row["batch"])) + 0.22 * (place - (len(methods) - 1) / 2) for row in own]
        axes.errorbar(
            at,
            [row[key]["mean"] for row in own],
            [row[key]["plus_minus"] for row in own],
            fmt="o",
            capsize=3,
            color=COLORS[method],
            label=method,
        )
    axes.axhline(1, color="#888888", linewidth=0.8)
    axes.axhline(0.97, color="#c64600", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(columns)), [f"{workload}\nbatch {batch}" for workload, batch in columns], fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pyplot.rcParams["svg.hashsalt"] = "specplug"
    rows = json.loads(args.measured.read_text())["rows"]
    spoiled = [row for row in rows if "to_best" not in row]
    good = [row for row in rows if "to_best" in row]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.4, 3.8))
    panel(left, spoiled, "to_plain", "drafts that are never accepted", "auto ÷ plain decoding")
    panel(right, good, "to_best", "good drafts", "auto ÷ best fixed length")
    left.legend(fontsize=8)
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
