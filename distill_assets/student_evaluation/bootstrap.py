"""95% intervals by resampling rows.

Positions of one row are dependent, so the row is what is drawn: resampling positions would claim
far more certainty than there is. Every figure here is a ratio of sums over rows, so per-row sums
are all a replicate needs, and figures taken from the same replicates are paired.

Legend: R = rows, C = columns of per-row sums, S = replicates (samples of R rows).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REPLICATES = 2000
SEED = 0
FEWEST_ROWS = 5  # below this, resampling rows says nothing; no interval is better than a false one
_DRAWS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% bootstrap interval; no interval when there are too few rows for one."""

    value: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """-1 or 1 when the whole interval lies below or above zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return -1 if self.high < 0 else 1 if self.low > 0 else 0


def bootstrap_sums(sums_RC: NDArray[np.float64], replicates: int = REPLICATES, seed: int = SEED) -> NDArray[np.float64]:
    """Column sums [S, C] over R rows drawn with replacement, S times; the same draws for all columns."""
    n_rows = len(sums_RC)
    rng = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // n_rows)
    parts: list[NDArray[np.float64]] = []
    for start in range(0, replicates, at_once):
        size = min(at_once, replicates - start)
        drawn = rng.integers(n_rows, size=(size, n_rows)) + np.arange(size)[:, None] * n_rows
        times_SR = np.bincount(drawn.ravel(), minlength=size * n_rows).reshape(size, n_rows)
        parts.append(times_SR.astype(np.float64) @ sums_RC)
    return np.concatenate(parts)


def estimate(value: float, replicates_S: NDArray[np.float64], n_rows: int) -> Estimate:
    """`value` with the 2.5% and 97.5% percentiles of its replicates."""
    if n_rows < FEWEST_ROWS:
        return Estimate(float(value), None, None)
    low, high = np.quantile(replicates_S, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))
