"""How figures are written, and the verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distill_assets.student_evaluation.bootstrap import Estimate
from distill_assets.student_evaluation.calibration import TEMPERATURES
from distill_assets.student_evaluation.evaluation import Evaluation
from distill_assets.student_evaluation.figures import Scope
from distill_assets.student_evaluation.metrics import RECORD_METRICS
from distill_assets.student_evaluation.wording import (
    calibration_rows,
    difference_rows,
    gap_sentences,
    number,
    summary_rows,
    verdict,
    write_estimate,
)

PERPLEXITY, KL, AGREEMENT, _ = RECORD_METRICS


@pytest.mark.parametrize(
    ("value", "decimals", "signed", "text"),
    [
        (2.154, 2, False, "2.15"),
        (-0.48, 2, True, "−0.48"),
        (0.48, 2, True, "+0.48"),
        (-0.0004, 3, True, "0.000"),
        (203522.4, 0, False, "203,522"),
    ],
)
def test_number(value: float, decimals: int, signed: bool, text: str) -> None:
    assert number(value, decimals, signed) == text


@pytest.mark.parametrize(
    ("metric", "figure", "signed", "text"),
    [
        (KL, Estimate(2.153, 2.096, 2.201), False, "2.15 [2.10, 2.20]"),
        (KL, Estimate(-0.48, -0.5512, -0.41), True, "−0.480 [−0.551, −0.410]"),
        (PERPLEXITY, Estimate(23.44, 20.0, 27.06), False, "23.4 [20.0, 27.1]"),
        (PERPLEXITY, Estimate(61234.5, 5000.0, 110000.0), False, "61,234 [5,000, 110,000]"),
        (AGREEMENT, Estimate(0.4128, 0.39, 0.4349), False, "41.3 [39.0, 43.5]"),
        (AGREEMENT, Estimate(0.023, -0.001, 0.05), True, "+2.3 [−0.1, +5.0]"),
        (KL, Estimate(0.0, None, None), False, "0"),
        (PERPLEXITY, None, False, "–"),
    ],
)
def test_estimate(metric: type, figure: Estimate | None, signed: bool, text: str) -> None:
    assert write_estimate(metric, figure, signed) == text  # type: ignore[arg-type]


def judged(evaluation: Evaluation, low: float | None, high: float | None) -> str:
    """The verdict of an evaluation whose KLs are 2.15 and 2.63 and whose interval is given."""
    kls = {"student": 2.15, "control": 2.63}
    models = {name: {"kl_nats": Estimate(kl, None, None)} for name, kl in kls.items()}
    scope = Scope("all", 4, 90, models, {"control": {"kl_nats": Estimate(-0.48, low, high)}})
    return verdict(replace(evaluation, overall=scope))


def test_verdict(evaluation: Evaluation) -> None:
    assert judged(evaluation, -0.55, -0.41) == (
        "The student is closer to the teacher than the control: KL 2.15 against 2.63 nats a position, "
        "difference −0.480 [−0.550, −0.410]."
    )
    assert judged(evaluation, 0.41, 0.55).startswith("The student is farther from the teacher than the control: ")
    undecided = judged(evaluation, -0.55, 0.02)
    assert undecided.startswith("It is not shown that the student differs from the control: KL 2.15 against 2.63")
    assert undecided.endswith("the interval contains zero.")
    few = judged(evaluation, None, None)
    assert few.startswith("Too few held-out rows to tell") and few.endswith("4 of at least 5 rows.")


def test_verdict_without_control_and_alone(evaluation: Evaluation) -> None:
    scope = evaluation.overall
    untrained_only = replace(scope, differences={"untrained": scope.differences["untrained"]})
    assert "closer to the teacher than the untrained student" in verdict(replace(evaluation, overall=untrained_only))
    assert verdict(replace(evaluation, overall=replace(scope, differences={}))).startswith("Nothing to compare")


def test_tables(evaluation: Evaluation) -> None:
    rows = summary_rows(evaluation)
    assert [row["model"] for row in rows] == ["untrained", "student", "control", "teacher"]
    assert list(rows[0]) == [
        "model",
        "Perplexity",
        "KL from teacher (nats a position)",
        "Top-1 agreement (% of positions)",
        "Expected acceptance (% of drafted tokens)",
        "positions",
        "rows",
    ]
    assert rows[3]["KL from teacher (nats a position)"] == "0"
    assert rows[3]["Top-1 agreement (% of positions)"] == "100.0"
    assert {row["rows"] for row in rows} == {"30"}
    differences = difference_rows(evaluation.overall, RECORD_METRICS)
    assert [row["difference"] for row in differences] == ["student − untrained", "student − control"]
    assert differences[1]["KL from teacher (nats a position)"].startswith("−")
    assert differences[1]["Top-1 agreement (percentage points)"].startswith("+")


def test_a_temperature_at_the_end_of_those_tried_is_a_bound(evaluation: Evaluation) -> None:
    c = evaluation.calibration["student"]
    tried = {"a": TEMPERATURES[0], "b": 1.307, "c": TEMPERATURES[-1]}
    given = {name: replace(c, temperature=temperature) for name, temperature in tried.items()}
    rows = calibration_rows(replace(evaluation, calibration=given))
    assert [row["Temperature"] for row in rows] == ["≤ 0.35", "1.31", "≥ 2.83"]


def test_a_gap_says_by_which_kl(evaluation: Evaluation, dense_evaluation: Evaluation) -> None:
    assert gap_sentences(evaluation)[0].startswith("By KL from teacher: the student closes ")
    assert gap_sentences(dense_evaluation)[0].startswith("By KL from teacher, dense: the student closes ")
