"""95% intervals by resampling rows.

Positions of one row are dependent, so the row is what is drawn: resampling positions would claim
far more certainty than there is. Every figure here is a ratio of sums over rows, so per-row sums
are all a replicate needs, and figures taken from the same replicates are paired.

Legend: R = rows, C = columns of per-row sums, S = replicates (samples of R rows).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REPLICATES = 2000
INTERVAL = f"95%: percentiles over {REPLICATES:,} bootstrap samples of whole rows"
SEED = 0
FEWEST_ROWS = 5  # below this, resampling rows says nothing; no interval is better than a false one
_DRAWS_AT_ONCE = 2_000_000

Columns = Mapping[tuple[str, str], NDArray[np.float64]]  # by (model, metric)


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


@dataclass(frozen=True)
class Resampled:
    """Figures by (model, metric) of some rows, [1], and of the bootstrap's samples of them, [S]."""

    n_rows: int
    n_positions: int
    points: Columns
    replicates: Columns

    @classmethod
    def of(cls, sums_RC: NDArray[np.float64], columns: Sequence[tuple[str, str]]) -> Resampled:
        """From per-row sums whose first column counts positions; rows without any are left out."""
        sums_RC = sums_RC[sums_RC[:, 0] > 0]
        totals_1C = sums_RC.sum(0)[None]
        drawn_SC = bootstrap_sums(sums_RC)
        return cls(len(sums_RC), int(totals_1C[0, 0]), _means(totals_1C, columns), _means(drawn_SC, columns))

    def figure(self, model: str, key: str) -> Estimate:
        return estimate(self.points[model, key][0], self.replicates[model, key], self.n_rows)

    def difference(self, model: str, other: str, key: str) -> Estimate:
        """`model` minus `other`, paired: from the same rows in each sample."""
        value = self.points[model, key][0] - self.points[other, key][0]
        return estimate(value, self.replicates[model, key] - self.replicates[other, key], self.n_rows)


def _means(sums_SC: NDArray[np.float64], columns: Sequence[tuple[str, str]]) -> Columns:
    """Sums over positions; perplexity is exp of its mean."""
    means_SC = sums_SC[:, 1:] / sums_SC[:, :1]
    return {
        (model, key): np.exp(means_SC[:, c]) if key == "perplexity" else means_SC[:, c]
        for c, (model, key) in enumerate(columns)
    }
