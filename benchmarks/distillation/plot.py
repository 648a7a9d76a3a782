"""The picture: share of the gap closed, against bytes a position on disk."""

from __future__ import annotations

import re
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
    figure, axes = plt.subplots(figsize=(9, 6.5), dpi=120, layout="constrained")
    # What is worse than no teacher at all is there to be seen, and leaves the room to what is better.
    axes.set_yscale("symlog", linthresh=100, linscale=2.5)
    for y, text in ((100, "dense: every id"), (0, "cross-entropy")):
        axes.axhline(y, color="black", linewidth=0.8)
        axes.text(0.005, y, text, transform=axes.get_yaxis_transform(), va="bottom", fontsize=8)
    axes.axvline(most_bytes, color="black", linewidth=0.8, linestyle=":")
    for family, color, marker in zip(FAMILIES, _COLORS, _MARKERS, strict=True):
        own = [line for line in results if line["family"] == family]
        for line in own:
            fresh, x, y = line["fresh share"] is not None, line["bytes a position"], _percent(line)
            if fresh and line["fresh low"] is not None:
                axes.vlines(x, 100 * line["fresh low"], 100 * line["fresh high"], color=color, linewidth=1.2)
            axes.plot(x, y, marker, color=color, markerfacecolor=color if fresh else "white", markersize=6)
            if y == max(_percent(other) for other in own if _label(other) == _label(line)):
                axes.annotate(_label(line), (x, y), textcoords="offset points", fontsize=7, **_place(line))
        axes.plot([], [], marker, color=color, label=family)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.15)
    axes.set_yticks([-200, -100, -50, 0, 50, 100], labels=["-200", "-100", "-50", "0", "50", "100"])
    axes.minorticks_off()
    axes.set_xlabel("bytes a position on disk, everything included")
    axes.set_ylabel("share of the gap closed, % (held-out dense KL)")
    axes.set_title(f"hollow: mean of {seeds[0]} seeds; filled: {seeds[1]} fresh seeds, 95% interval", fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    with plt.rc_context({"svg.hashsalt": "quality"}):  # the same figures are the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _percent(line: Mapping[str, Any]) -> float:
    share: float = line["share of the gap"] if line["fresh share"] is None else line["fresh share"]
    return 100 * share


def _label(line: Mapping[str, Any]) -> str:
    """The targets, "+ 4" being 4 tail samples; the best of their weights alone has a name. The family says the rest."""
    name = str(line["arm"]).removesuffix(f", {line['family']}").removeprefix("renormalised ")
    return re.sub(r", (\d+) tail samples.*", r" + \1", name)


def _place(line: Mapping[str, Any]) -> dict[str, Any]:
    """To the left where the same targets have another name to the right."""
    left = line["family"] in (FAMILIES[0], FAMILIES[-1])
    return {"xytext": (-6 if left else 6, -2), "ha": "right" if left else "left"}
