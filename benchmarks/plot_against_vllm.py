"""Draw what benchmarks/against_vllm.py measured: how many times vLLM's tokens per second, method by method.

pip install matplotlib
python benchmarks/plot_against_vllm.py 256M=build/against-256m.json 33M=build/against-33m.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

COLORS = {"plain decoding": "#77767b", "ngram": "#1a5fb4", "draft_model": "#26a269", "eagle3": "#813d9c"}


def read(argument: str) -> list[dict[str, Any]]:
    """The ratios to vLLM of one file, given as NAME=FILE."""
    name, _, path = argument.partition("=")
    reports = json.loads(Path(path).read_text(encoding="utf-8"))
    return [
        {**row, "where": f"{name}, {workload}\n{row['batch']} row{'s' * (row['batch'] > 1)}"}
        for workload, report in reports.items()
        for row in report["ratios"]
        if row["peer"].startswith("vLLM") and row["ratio"] is not None
    ]


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """One group of bars for each target and number of rows."""
    places = list(dict.fromkeys(row["where"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(1.6 + 1.9 * len(places), 3.6))
    width = 0.8 / len(COLORS)
    for number, (method, color) in enumerate(COLORS.items()):
        own = [row for row in rows if row["method"] == method]
        at = [places.index(row["where"]) + width * (number - (len(COLORS) - 1) / 2) for row in own]
        ratios = [row["ratio"] for row in own]
        axes.bar(at, [ratio["median"] for ratio in ratios], width * 0.9, color=color, label=method)
        spans = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
        axes.errorbar(at, [r["median"] for r in ratios], spans, fmt="none", ecolor="#3d3846", elinewidth=0.9, capsize=2)
        for place, ratio in zip(at, ratios, strict=True):
            text = f"{ratio['median']:.2f}"
            axes.annotate(text, (place, 0.06), ha="center", fontsize=7, color="white", rotation=90, va="bottom")
    axes.axhline(1, color="#c64600", linewidth=0.9)
    axes.set_xticks(range(len(places)), places, fontsize=8)
    axes.set_ylabel("tokens/s, times vLLM's")
    axes.legend(fontsize=8, ncol=len(COLORS), frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.14))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    print(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", help="NAME=FILE")
    parser.add_argument("--out", type=Path, default=Path("docs/images/against-vllm.svg"))
    args = parser.parse_args()
    pyplot.rcParams["svg.hashsalt"] = "specplug"
    draw([row for report in args.reports for row in read(report)], args.out)


if __name__ == "__main__":
    main()
