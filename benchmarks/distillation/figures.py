"""Shares of the gap between cross-entropy and dense distillation, their intervals, and which arms go on.

Legend: S = seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# 97.5% points of Student's t, by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95% interval; None for a single seed."""

    mean: float
    low: float | None
    high: float | None

    @property
    def is_positive(self) -> bool:
        return self.low is not None and self.low > 0


def over_seeds(values_S: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Student's t over seeds: they are few, so that a bootstrap of them would claim too much."""
    values = np.asarray(values_S, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, None, None)
    half = _T[len(values) - 1] * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def gap_shares(hard_S: Sequence[float], dense_S: Sequence[float], arm_S: Sequence[float]) -> NDArray[np.float64]:
    """Per seed, how much of the way from cross-entropy (0) to dense distillation (1) an arm comes.

    All students of one seed have the same start and the same rows in the same order: where one is lucky, all are.
    """
    hard, dense, arm = (np.asarray(values, dtype=np.float64) for values in (hard_S, dense_S, arm_S))
    return (hard - arm) / (hard - dense)


def best_arms(
    share: Mapping[str, float], bytes_a_position: Mapping[str, float], n: int, most_bytes: float
) -> list[str]:
    """`n` names, best first: half of them the best that take at most `most_bytes`, the others the best left."""
    ranked = sorted(share, key=lambda name: -share[name])
    cheap = [name for name in ranked if bytes_a_position[name] <= most_bytes][: n // 2]
    others = [name for name in ranked if name not in cheap][: n - len(cheap)]
    return sorted([*cheap, *others], key=lambda name: -share[name])
