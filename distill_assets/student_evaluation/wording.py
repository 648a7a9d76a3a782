"""Figures in words: how a number is written, and what the comparison comes to in one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distill_assets.student_evaluation.bootstrap import FEWEST_ROWS, Estimate
from distill_assets.student_evaluation.calibration import TEMPERATURES
from distill_assets.student_evaluation.evaluation import Evaluation
from distill_assets.student_evaluation.figures import GapShare, Scope
from distill_assets.student_evaluation.identity import STUDENT
from distill_assets.student_evaluation.metrics import Metric

NOTHING = "–"
MINUS = "−"


def number(value: float, decimals: int, signed: bool = False) -> str:
    """A rounded number with a true minus sign and thousands separators; never "−0.00"."""
    rounded = round(value, decimals)
    text = f"{abs(rounded):,.{decimals}f}"
    sign = MINUS if rounded < 0 else "+" if signed and rounded > 0 else ""
    return sign + text


def write_estimate(metric: Metric, figure: Estimate | None, signed: bool = False) -> str:
    """`8.31 [8.02, 8.64]`, in percent where the metric is a share; all with the value's decimals.

    `signed` is for differences: of shares they are percentage points, `+2.3 [+1.1, +3.4]`.
    """
    if figure is None:
        return NOTHING
    scale = 100.0 if metric.style == "percent" else 1.0
    decimals = 1 if metric.style == "percent" else _decimals(figure.value)
    value = number(figure.value * scale, decimals, signed)
    if figure.low is None or figure.high is None:
        return value
    low, high = (number(bound * scale, decimals, signed) for bound in (figure.low, figure.high))
    return f"{value} [{low}, {high}]"


def _decimals(value: float) -> int:
    """Three significant digits, of which at most three behind the point."""
    if not math.isfinite(value) or value == 0:
        return 0
    return max(0, min(3, 2 - math.floor(math.log10(abs(value)))))


def verdict(evaluation: Evaluation) -> str:
    """One sentence on whether the student is closer to the teacher than its rival.

    It follows the paired 95% interval of the KL difference: only an interval on one side of zero
    says that there is a difference.
    """
    scope, rival, kl = evaluation.overall, evaluation.rival, evaluation.kl
    student_kl = scope.models[STUDENT][kl.key]
    assert student_kl is not None
    if rival is None:
        return f"Nothing to compare the student with: its KL from the teacher is {write_estimate(kl, student_kl)} nats."
    other = "the control" if rival == "control" else "the untrained student"
    rival_kl, difference = scope.models[rival][kl.key], scope.differences[rival][kl.key]
    assert rival_kl is not None
    values = (
        f"{'dense ' if evaluation.is_dense else ''}KL {number(student_kl.value, _decimals(student_kl.value))} against "
        f"{number(rival_kl.value, _decimals(rival_kl.value))} nats a position, "
        f"difference {write_estimate(kl, difference, signed=True)}"
    )
    if difference.low is None:
        return (
            f"Too few held-out rows to tell whether the student is closer to the teacher than {other}: {values}; "
            f"{scope.n_rows} of at least {FEWEST_ROWS} rows."
        )
    if evaluation.outcome == "undecided":
        return f"It is not shown that the student differs from {other}: {values}; the interval contains zero."
    return f"The student is {evaluation.outcome} {_TO[evaluation.outcome]} the teacher than {other}: {values}."


_TO = {"closer": "to", "farther": "from"}


def column(metric: Metric, difference: bool = False) -> str:
    """The heading of a metric's column, with its unit; a difference of shares is in percentage points."""
    unit = "percentage points" if difference and metric.style == "percent" else metric.unit
    return f"{metric.label} ({unit})" if unit else metric.label


def summary_rows(evaluation: Evaluation, metrics: Sequence[Metric] | None = None) -> list[dict[str, str]]:
    """One row a model, ready to print; column headings are the keys, intervals are 95%. All metrics unless named."""
    scope = evaluation.overall
    return [
        {
            "model": name,
            **{column(m): write_estimate(m, figures[m.key]) for m in metrics or evaluation.metrics},
            "positions": f"{scope.n_positions:,}",
            "rows": f"{scope.n_rows:,}",
        }
        for name, figures in scope.models.items()
    ]


def difference_rows(scope: Scope, metrics: Sequence[Metric]) -> list[dict[str, str]]:
    """One row a comparison: student minus another model, shares in percentage points."""
    return [
        {
            "difference": f"{STUDENT} {MINUS} {other}",
            **{column(m, difference=True): write_estimate(m, d[m.key], signed=True) for m in metrics},
        }
        for other, d in scope.differences.items()
    ]


def calibration_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """One row a model that has a calibration: errors in percent, and the temperature between them."""
    return [
        {
            "model": name,
            "ECE (%)": number(100 * c.ece_share, 1),
            "Temperature": _fitted(c.temperature),
            "ECE with it (%)": number(100 * c.tempered_ece_share, 1),
            "positions": f"{c.n_positions:,}",
            "rows": f"{c.n_rows:,}",
        }
        for name, c in evaluation.calibration.items()
    ]


def _fitted(temperature: float) -> str:
    """A temperature at an end of those tried is not the best one, but the best tried."""
    bound = {TEMPERATURES[0]: "≤ ", TEMPERATURES[-1]: "≥ "}.get(temperature, "")
    return bound + number(temperature, 2)


def gap_sentences(evaluation: Evaluation) -> list[str]:
    """A sentence a measure: how much of the way from the control to the teacher the student went."""
    return [_gap_sentence(closed, evaluation.kl) for closed in evaluation.overall.closed]


def _gap_sentence(closed: GapShare, kl: Metric) -> str:
    what = kl.label if closed.measure == "kl" else "negative log-likelihood of the next token"
    gap = _with_interval(closed.gap_nats, 1, 3)
    if closed.share is None:
        return (
            f"By {what}: no share is given, because the control is not shown to be worse than the teacher "
            f"(control {MINUS} teacher: {gap} nats)."
        )
    low, high = closed.share.low, closed.share.high
    undecided = low is not None and high is not None and low <= 0 <= high
    return (
        f"By {what}: the student closes {write_share(closed.share)}% of the way from the control to the "
        f"teacher, which is {gap} nats long{'; it is not shown to differ from the control' if undecided else ''}."
    )


def write_share(share: Estimate) -> str:
    """In percent, `69.9 [68.5, 71.2]`."""
    return _with_interval(share, 100, 1)


def _with_interval(figure: Estimate, scale: float, decimals: int) -> str:
    value = number(figure.value * scale, decimals)
    if figure.low is None or figure.high is None:
        return value
    return f"{value} [{number(figure.low * scale, decimals)}, {number(figure.high * scale, decimals)}]"
