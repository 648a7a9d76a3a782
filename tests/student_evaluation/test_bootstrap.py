"""The bootstrap against a slow loop, its coverage, and why rows are resampled."""

from __future__ import annotations

import numpy as np
import pytest

from distill_assets.student_evaluation import bootstrap
from distill_assets.student_evaluation.bootstrap import FEWEST_ROWS, Estimate, bootstrap_sums, estimate


def slow_interval(sums_RC: np.ndarray, replicates: int, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(replicates):
        numerator = denominator = 0.0
        for _ in range(len(sums_RC)):
            row = sums_RC[rng.integers(len(sums_RC))]
            denominator += row[0]
            numerator += row[1]
        values.append(numerator / denominator)
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def test_agrees_with_a_slow_loop() -> None:
    rng = np.random.default_rng(3)
    n_R = rng.integers(1, 20, size=25).astype(float)
    sums_RC = np.stack([n_R, n_R * rng.normal(2.0, 0.5, size=25)], axis=1)
    sums_SC = bootstrap_sums(sums_RC, replicates=4000)
    fast = estimate(sums_RC[:, 1].sum() / n_R.sum(), sums_SC[:, 1] / sums_SC[:, 0], 25)
    low, high = slow_interval(sums_RC, 4000, seed=7)
    assert fast.low == pytest.approx(low, abs=0.015)
    assert fast.high == pytest.approx(high, abs=0.015)


def test_every_replicate_draws_as_many_rows_as_there_are() -> None:
    sums_SC = bootstrap_sums(np.stack([np.ones(11), np.arange(11.0)], axis=1), replicates=300)
    assert sums_SC.shape == (300, 2)
    assert (sums_SC[:, 0] == 11).all()
    assert len(np.unique(sums_SC[:, 1])) > 30
    assert sums_SC[:, 1].mean() == pytest.approx(55, abs=2.5)


def test_columns_are_drawn_together_and_the_seed_is_fixed() -> None:
    x_R = np.random.default_rng(0).normal(size=40)
    sums_SC = bootstrap_sums(np.stack([x_R, x_R + 1.0], axis=1), replicates=200)
    np.testing.assert_allclose(sums_SC[:, 1] - sums_SC[:, 0], 40.0)
    np.testing.assert_array_equal(sums_SC, bootstrap_sums(np.stack([x_R, x_R + 1.0], axis=1), replicates=200))


def test_more_rows_than_fit_in_one_block() -> None:
    n_rows = bootstrap._DRAWS_AT_ONCE // 3  # three replicates a block, the last block unfilled
    sums_SC = bootstrap_sums(np.ones((n_rows, 1)), replicates=7)
    assert (sums_SC == n_rows).all() and sums_SC.shape == (7, 1)


def coverage(resample_rows: bool) -> float:
    """Share of 300 simulated data sets whose 95% interval holds the true mean, 0.

    30 rows of 20 positions each; a row has a level of its own, so its positions are dependent.
    """
    rng = np.random.default_rng(11)
    hits = 0
    for simulation in range(300):
        x_RP = rng.normal(size=(30, 1)) + rng.normal(size=(30, 20))
        units = x_RP if resample_rows else x_RP.reshape(-1, 1)
        sums_RC = np.stack([np.full(len(units), float(units.shape[1])), units.sum(1)], axis=1)
        sums_SC = bootstrap_sums(sums_RC, replicates=300, seed=simulation)
        e = estimate(x_RP.mean(), sums_SC[:, 1] / sums_SC[:, 0], len(units))
        assert e.low is not None and e.high is not None
        hits += e.low <= 0.0 <= e.high
    return hits / 300


def test_coverage_is_nominal_for_rows_and_not_for_positions() -> None:
    assert 0.90 <= coverage(resample_rows=True) <= 0.98
    assert coverage(resample_rows=False) < 0.6


def test_too_few_rows_have_no_interval() -> None:
    few = estimate(1.5, np.array([1.4, 1.6]), FEWEST_ROWS - 1)
    assert few == Estimate(1.5, None, None)
    assert few.sign == 0


@pytest.mark.parametrize(("low", "high", "sign"), [(-2.0, -1.0, -1), (-1.0, 1.0, 0), (1.0, 2.0, 1), (0.0, 0.0, 0)])
def test_sign_needs_the_whole_interval(low: float, high: float, sign: int) -> None:
    assert Estimate((low + high) / 2, low, high).sign == sign
