"""The picture: share of the gap closed, against bytes a position on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from .arms import FAMILIES

_COLORS = ("#b2182b", "#2166ac", "#1b7837", "#e08214", "#762a83", "#737373", "#0097a7")
_MARKERS = ("v", "o", "D", "s", "^", "P", "X")


def draw(results: Sequence[Mapping[str, Any]], seeds: tuple[int, int], most_bytes: float, path: Path) -> None:
    """Filled, with intervals: judged on fresh seeds; hollow: on the first ones alone. `seeds`: how many of each."""
    figure, axes = plt.subplots(figsize=(8, 5), dpi=120, layout="constrained")
    axes.axhline(100, color="black", linewidth=0.8)
    axes.axhline(0, color="black", linewidth=0.8)
    for y, text in ((100, "dense: every id"), (0, "cross-entropy")):
        axes.text(0.99, y, text, transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
    axes.axvline(most_bytes, color="black", linewidth=0.8, linestyle=":")
    for family, color, marker in zip(FAMILIES, _COLORS, _MARKERS, strict=True):
        own = [line for line in results if line["family"] == family]
        for line in own:
            fresh = line["fresh share"] is not None
            x, y = line["bytes a position"], 100 * (line["fresh share"] if fresh else line["share of the gap"])
            if fresh and line["fresh low"] is not None:
                axes.vlines(x, 100 * line["fresh low"], 100 * line["fresh high"], color=color, linewidth=1.2)
            axes.plot(x, y, marker, color=color, markerfacecolor=color if fresh else "white", markersize=6)
            axes.annotate(line["arm"].split(", lambda")[0], (x, y), (5, 3), textcoords="offset points", fontsize=6.5)
        axes.plot([], [], marker, color=color, label=family)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("bytes a position on disk, everything included")
    axes.set_ylabel("share of the gap closed, % (held-out dense KL)")
    axes.set_title(f"hollow: mean of {seeds[0]} seeds; filled: {seeds[1]} fresh seeds, 95% interval", fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path)
    plt.close(figure)
