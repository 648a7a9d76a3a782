"""Calibration: by hand, against a fine search in float64, and that no row is judged by what was fitted on it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from distill_assets.student_evaluation.calibration import (
    TEMPERATURES,
    calibration_error,
    fit_temperature,
    is_fitted_on,
    nll_by_temperature,
)
from distill_assets.student_evaluation.evaluation import Evaluation
from distill_assets.student_evaluation.scoring import score_model
from distill_assets.student_model.vocabulary import StudentVocabulary
from tests.student_evaluation.capturing import dense_logprobs, random_rows


def test_error_by_hand() -> None:
    confidence = np.array([0.95, 0.97, 0.50, 0.50, 1.0])
    right = np.array([True, False, True, False, True])
    # bins of a fifteenth: 0.95, 0.97 and 1.0 share the last, the two halves another
    expected = (abs(0.95 + 0.97 + 1.0 - 2) + abs(1.0 - 1)) / 5
    assert calibration_error(confidence, right) == pytest.approx(expected)
    assert calibration_error(np.full(4, 0.25), np.array([True, False, False, False])) == 0


def test_sums_are_those_of_each_temperature() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, size=(6, 11))).float()
    logits[:, 4] = -1e30  # no outcome
    gold = torch.tensor([0, 1, 2, 3, 5, 10])
    for temperature, found in zip(TEMPERATURES, nll_by_temperature(logits, gold), strict=True):
        logq = (logits.double() / temperature).log_softmax(-1)
        assert found == pytest.approx(-float(logq[range(6), gold].sum()), rel=1e-5)
    assert 1.0 in TEMPERATURES


@pytest.mark.parametrize("truth", [0.55, 1.0, 1.3, 2.2])
def test_finds_the_temperature_that_was_lost(truth: float) -> None:
    """Ids drawn from softmax(logits / truth): what is found is where a fine search ends, and near the truth."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, size=(4000, 8))
    p = np.exp(logits / truth)
    gold = (p.cumsum(1) / p.sum(1, keepdims=True) < rng.random((4000, 1))).sum(1)
    found = fit_temperature(nll_by_temperature(torch.from_numpy(logits).float(), torch.from_numpy(gold)))

    def nll(temperature: float) -> float:
        z = logits / temperature
        return float((np.log(np.exp(z).sum(1)) - z[range(4000), gold]).mean())

    finest = min(np.arange(0.35, 2.83, 0.002), key=nll)
    assert found == pytest.approx(finest, rel=0.02)
    assert found == pytest.approx(truth, rel=0.1)
    assert nll(found) - nll(finest) < 1e-4


def test_beyond_the_ends_it_is_the_end() -> None:
    rising = np.arange(len(TEMPERATURES), dtype=np.float64)
    assert fit_temperature(rising) == TEMPERATURES[0]
    assert fit_temperature(-rising) == TEMPERATURES[-1]


def test_fitted_on_one_half_and_measured_on_the_other(
    teacher: PreTrainedModel, student: PreTrainedModel, n_real: int
) -> None:
    rows = random_rows(teacher, 12, k=4, n_real=n_real)
    halves = [is_fitted_on(row.key) for row in rows]
    assert 2 < sum(halves) < 10
    scores = score_model(student, rows, StudentVocabulary(n_real), batch_tokens=60)
    fitted_N = np.repeat(halves, [row.targets.n_positions for row in rows])
    np.testing.assert_array_equal(np.isnan(scores.tempered_N), fitted_N)

    logq = np.concatenate([dense_logprobs(student, r.input_ids, n_real)[r.targets.positions_P] for r in rows])
    gold = np.concatenate([r.input_ids[r.targets.positions_P + 1] for r in rows])

    def nll(temperature: float) -> float:
        z = logq[fitted_N] / temperature
        return float((np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), gold[fitted_N]]).mean())

    assert nll(scores.temperature) - min(map(nll, np.arange(0.354, 2.828, 0.01))) < 2e-3
    z = logq[~fitted_N] / scores.temperature
    expected = np.exp(z.max(1)) / np.exp(z).sum(1)
    np.testing.assert_allclose(scores.tempered_N[~fitted_N], expected, rtol=1e-4)
    np.testing.assert_array_equal(scores.right_N, logq.argmax(1) == gold)


def test_no_half_no_calibration(teacher: PreTrainedModel, n_real: int) -> None:
    rows = [row for row in random_rows(teacher, 12, k=4, n_real=n_real) if not is_fitted_on(row.key)]
    scores = score_model(teacher, rows, StudentVocabulary(n_real))
    assert math.isnan(scores.temperature) and np.isnan(scores.tempered_N).all()


def test_both_errors_are_of_the_same_positions(evaluation: Evaluation) -> None:
    assert list(evaluation.calibration) == ["untrained", "student", "control"]
    for c in evaluation.calibration.values():
        assert 0 <= c.tempered_ece_share <= 1 and 0 < c.ece_share <= 1
        assert c.n_positions + c.n_fitted_positions == evaluation.overall.n_positions
    # Ids drawn at random come as none expects, and a random network is far too sure of itself.
    student = evaluation.calibration["student"]
    assert student.temperature > 1.5 and student.tempered_ece_share < student.ece_share
