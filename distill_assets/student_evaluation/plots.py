"""The report's pictures as PNG bytes, drawn with matplotlib's objects (no global pyplot state).

Their background is solid and light, so that they read the same on a white and on a dark page.
Nothing in them depends on the clock or the machine: the same figures give the same picture.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from PIL import Image

from distill_assets.student_evaluation.bootstrap import Estimate
from distill_assets.student_evaluation.evaluation import Evaluation
from distill_assets.student_evaluation.identity import STUDENT, TEACHER
from distill_assets.student_evaluation.metrics import BY_KEY, DENSE_METRICS, RECORD_METRICS, Metric

Curve = Sequence[Mapping[str, Any]]

_INK, _SOFT, _GRID, _PAPER = "#1d2530", "#5c6672", "#e3e6ea", "#fbfbf9"
_COLOURS = {STUDENT: "#1f5fbf", "control": "#c9571b", "untrained": "#8b929b", TEACHER: "#1d2530"}
_MARKERS = {STUDENT: "o", "control": "s", "untrained": "D", TEACHER: "P"}
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.edgecolor": _SOFT,
    "axes.facecolor": _PAPER,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "figure.facecolor": _PAPER,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "text.color": _INK,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
}
_DPI = 160
_PNG_COLOURS = 64  # line drawings need few; a third of the bytes


def draw_pictures(evaluation: Evaluation, curves: Mapping[str, Curve]) -> dict[str, bytes]:
    """PNG bytes by name: `dense`, `metrics`, `entropy`, `kept_mass`, `loss`.

    A picture whose data does not exist (no dense figures, no curve, no known entropy) is left out.
    """
    with rc_context(_STYLE):
        pictures = {"dense": draw_metrics(evaluation.overall.models, DENSE_METRICS)} if evaluation.is_dense else {}
        pictures["metrics"] = draw_metrics(evaluation.overall.models, RECORD_METRICS)
        if evaluation.entropy_bins:
            pictures["entropy"] = draw_by_entropy(evaluation)
        pictures["kept_mass"] = draw_kept_mass(evaluation.kept_mass)
        if any(curves.values()):
            pictures["loss"] = draw_curves(curves)
    return pictures


def draw_comparison(models: Mapping[str, Mapping[str, Estimate]], metrics: Sequence[Metric]) -> bytes:
    """`draw_metrics` of students by name, whose last word is their kind, in a style of our own."""
    with rc_context(_STYLE):
        return draw_metrics(models, metrics)


def draw_metrics(models: Mapping[str, Mapping[str, Estimate | None]], metrics: Sequence[Metric]) -> bytes:
    """A panel a metric, a dot with its 95% interval a model."""
    rows = (len(metrics) + 1) // 2
    figure, axes = _panels(rows, 2, height=rows * (0.5 + 0.41 * len(models)))
    for n, (ax, metric) in enumerate(zip(axes, metrics, strict=False)):
        _metric_panel(ax, metric, {name: figures[metric.key] for name, figures in models.items()})
        ax.tick_params(axis="y", labelleft=n % 2 == 0)  # once a row of panels
    for ax in axes[len(metrics) :]:
        ax.set_axis_off()
    return _png(figure)


def _metric_panel(ax: Axes, metric: Metric, figures: Mapping[str, Estimate | None]) -> None:
    scale = 100.0 if metric.style == "percent" else 1.0
    shown = {name: f for name, f in figures.items() if f is not None}
    for y, name in enumerate(figures):
        if (f := shown.get(name)) is None:
            continue
        if f.low is not None and f.high is not None:
            ax.plot([f.low * scale, f.high * scale], [y, y], color=_colour(name), linewidth=2.4, alpha=0.55)
        ax.plot([f.value * scale], [y], _marker(name), color=_colour(name), markersize=7, clip_on=False)
    ax.set_yticks(range(len(figures)), list(figures))
    ax.tick_params(axis="y", length=0, pad=8, labelcolor=_INK)
    ax.set_ylim(len(figures) - 0.5, -0.5)
    ax.grid(axis="x")
    ax.set_title(metric.label)
    values = [f.value for f in shown.values()]
    unit = f"{metric.unit}, " if metric.unit else ""
    if metric.key == "perplexity" and max(values) > 10 * min(values):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        ax.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
        unit = "log scale, "
    else:
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    ax.set_xlabel(f"{unit}{metric.better} is better")


def draw_by_entropy(evaluation: Evaluation) -> bytes:
    """Top-1 agreement and KL of each model over the teacher's mean entropy in each bin."""
    bins = evaluation.entropy_bins
    figure, (left, right) = _panels(1, 2, height=3.1)
    x = [b.mean_nats for b in bins]
    for name in bins[0].agreement_share:
        _banded_line(left, x, [b.agreement_share[name] for b in bins], name, scale=100)
        _banded_line(right, x, [b.kl_nats[name] for b in bins], name)
    left.set_ylim(0, 100)
    left.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    left.set_title(BY_KEY["agreement_share"].label)
    right.set_ylim(bottom=0)
    right.set_ylabel("nats a position")
    right.set_title(evaluation.kl.label)
    for ax in (left, right):
        ax.set_xlabel(f"teacher's entropy, nats\n({len(bins)} bins of about {bins[0].n_positions:,} positions)")
        ax.grid()
    left.legend(loc="upper right")
    return _png(figure)


def _banded_line(ax: Axes, x: Sequence[float], estimates: Sequence[Estimate], name: str, scale: float = 1) -> None:
    """Estimates over x, and their intervals as a band where all have one."""
    if all(e.low is not None for e in estimates):
        low, high = ([scale * getattr(e, side) for e in estimates] for side in ("low", "high"))
        ax.fill_between(x, low, high, color=_colour(name), alpha=0.13, linewidth=0)
    y = [scale * e.value for e in estimates]
    ax.plot(x, y, marker=_marker(name), color=_colour(name), markersize=4.5, linewidth=1.6, label=name)


def draw_kept_mass(kept_mass: Sequence[float]) -> bytes:
    """Mean mass of the first j stored ids of a position over j."""
    figure, (ax,) = _panels(1, 1, height=2.8)
    j = np.arange(1, len(kept_mass) + 1)
    ax.plot(j, 100 * np.asarray(kept_mass), color=_COLOURS[STUDENT], linewidth=1.8, marker="o", markersize=3)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.yaxis.set_major_formatter(PercentFormatter(decimals=0 if kept_mass[0] < 0.9 else 1))
    ax.set_ylim(top=100)
    ax.set_xlabel("ids kept at a position (log scale)")
    ax.set_ylabel("mean mass kept")
    ax.annotate(
        f"{100 * kept_mass[-1]:.1f}% with {len(kept_mass)}",
        (float(j[-1]), 100 * kept_mass[-1]),
        xytext=(0, -26),
        textcoords="offset points",
        ha="right",
    )
    ax.grid()
    return _png(figure)


def draw_curves(curves: Mapping[str, Curve]) -> bytes:
    """Cross-entropy of every student and distillation loss of those that have one, over the steps."""
    distilled = {name: curve for name, curve in curves.items() if any(p.get("kd") is not None for p in curve)}
    panels = [("Cross-entropy on the next token", "ce", curves)]
    if distilled:
        panels.append(("Distillation loss", "kd", distilled))
    figure, axes = _panels(1, len(panels), height=2.9)
    for ax, (title, key, shown) in zip(axes, panels, strict=True):
        for name, curve in shown.items():
            points = [(p["step"], p[key]) for p in curve if p.get(key) is not None]
            _smoothed_line(ax, points, _colour(name), name)
        ax.set_title(title)
        ax.set_xlabel("optimiser step")
        ax.set_ylabel("nats a position")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.grid()
        ax.legend(loc="upper right")
    return _png(figure)


def _smoothed_line(ax: Axes, points: Sequence[tuple[int, float]], colour: str, label: str) -> None:
    """The points, faint, and over them their mean in a window of a twentieth of the curve."""
    if not points:
        return
    steps, values = np.asarray(points, dtype=np.float64).T
    ax.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    half = len(values) // 40
    sums = np.concatenate([[0.0], values.cumsum()])
    first = np.clip(np.arange(len(values)) - half, 0, None)
    last = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    ax.plot(steps, (sums[last] - sums[first]) / (last - first), color=colour, linewidth=1.8, label=label)


def _panels(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7.2, height), dpi=_DPI, layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09))
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _colour(name: str) -> str:
    return _COLOURS[_kind(name)]


def _marker(name: str) -> str:
    return _MARKERS[_kind(name)]


def _kind(name: str) -> str:
    return name.rpartition(" ")[2]


def _png(figure: Figure) -> bytes:
    """Drawn once: `savefig` draws, and lays out, a second time."""
    canvas, file = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(_PNG_COLOURS).save(file, format="png", optimize=True)
    return file.getvalue()
