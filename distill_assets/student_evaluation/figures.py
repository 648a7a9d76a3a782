"""Positions of all models side by side, and the figures made of them.

Legend: R = rows, N = supervised positions of all of them, C = columns of sums, S = replicates,
K = most ids kept. Every position counts once; a row's training weight plays no part here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_assets.student_evaluation.bootstrap import Estimate, bootstrap_sums, estimate
from distill_assets.student_evaluation.metrics import METRICS
from distill_assets.student_evaluation.scoring import PositionScores
from distill_assets.teacher_capture.sparse_targets import CapturedRow

TEACHER, STUDENT = "teacher", "student"
MOST_BINS = 8
FEWEST_IN_BIN = 25  # positions; fewer make an agreement that jumps by 4 points at each of them

Figures = Mapping[str, Estimate | None]


@dataclass(frozen=True)
class Scope:
    """The figures on some rows: all held-out rows, or those of one shard.

    `models` holds a figure per metric of each model, teacher last; None where the capture cannot
    tell. `differences` holds student minus that other model, paired (the same rows in each
    replicate).
    """

    name: str
    n_rows: int
    n_positions: int
    models: Mapping[str, Figures]
    differences: Mapping[str, Mapping[str, Estimate]]


@dataclass(frozen=True)
class EntropyBin:
    """Agreement of each model where the teacher's entropy lies in [low, high] nats."""

    low: float
    high: float
    mean: float
    n_rows: int
    n_positions: int
    agreement: Mapping[str, Estimate]


@dataclass(frozen=True)
class PositionTable:
    """Every supervised position: its row, its slot in that row, and what each model made of it."""

    row_N: NDArray[np.int64]
    slot_N: NDArray[np.int64]
    n_rows: int
    entropy_N: NDArray[np.float64]
    gold_logprob_N: NDArray[np.float64]
    scores: Mapping[str, PositionScores]

    @classmethod
    def of(cls, rows: Sequence[CapturedRow], scores: Mapping[str, PositionScores]) -> PositionTable:
        counts = [row.targets.n_positions for row in rows]
        return cls(
            row_N=np.repeat(np.arange(len(rows)), counts),
            slot_N=np.concatenate([np.arange(count) for count in counts]),
            n_rows=len(rows),
            entropy_N=np.concatenate([row.targets.entropy_P for row in rows]).astype(np.float64),
            gold_logprob_N=np.concatenate([row.targets.gold_logprob_P for row in rows]).astype(np.float64),
            scores=scores,
        )

    def row_sums(self, values_N: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(self.row_N, weights=values_N, minlength=self.n_rows).astype(np.float64, copy=False)

    def scope(self, name: str, rows_R: NDArray[np.bool_]) -> Scope:
        """Figures, differences and intervals on the rows marked."""
        values = {
            (model, key): values_N
            for model, s in self.scores.items()
            for key, values_N in (
                ("perplexity", s.nll_N),
                ("kl", s.kl_N),
                ("agreement", s.agrees_N),
                ("acceptance", s.acceptance_N),
            )
        }
        if np.isfinite(self.gold_logprob_N).all():  # a capture from elsewhere need not have it
            values[TEACHER, "perplexity"] = -self.gold_logprob_N
        sums = np.stack([self.row_sums(np.ones(len(self.row_N))), *map(self.row_sums, values.values())], axis=1)
        sums = sums[rows_R & (sums[:, 0] > 0)]
        points, replicates = _figures(sums.sum(0)[None], list(values)), _figures(bootstrap_sums(sums), list(values))
        n_rows, n_positions = len(sums), int(sums[:, 0].sum())

        def figure(model: str, key: str) -> Estimate:
            return estimate(points[model, key][0], replicates[model, key], n_rows)

        def difference(other: str, key: str) -> Estimate:
            value = points[STUDENT, key][0] - points[other, key][0]
            return estimate(value, replicates[STUDENT, key] - replicates[other, key], n_rows)

        figures: dict[str, Figures] = {name: {m.key: figure(name, m.key) for m in METRICS} for name in self.scores}
        figures[TEACHER] = {
            "perplexity": figure(TEACHER, "perplexity") if (TEACHER, "perplexity") in values else None,
            "kl": Estimate(0.0, None, None),  # by definition, as are the next two
            "agreement": Estimate(1.0, None, None),
            "acceptance": Estimate(1.0, None, None),
        }
        others = [other for other in self.scores if other != STUDENT]
        differences = {other: {m.key: difference(other, m.key) for m in METRICS} for other in others}
        return Scope(name, n_rows, n_positions, figures, differences)


def _figures(
    sums_SC: NDArray[np.float64], columns: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Each figure [S] from sums whose first column counts positions; perplexity is exp of its mean."""
    means_SC = sums_SC[:, 1:] / sums_SC[:, :1]
    return {
        (model, key): np.exp(means_SC[:, c]) if key == "perplexity" else means_SC[:, c]
        for c, (model, key) in enumerate(columns)
    }


def entropy_bins(table: PositionTable) -> tuple[EntropyBin, ...]:
    """Equally filled bins of the positions whose entropy is known, by rising entropy."""
    known = np.flatnonzero(np.isfinite(table.entropy_N))
    by_entropy = known[np.argsort(table.entropy_N[known], kind="stable")]
    n_bins = min(MOST_BINS, len(by_entropy) // FEWEST_IN_BIN)
    bins: list[EntropyBin] = []
    for chosen in np.array_split(by_entropy, n_bins) if n_bins else []:
        in_bin_N = np.zeros(len(table.row_N))
        in_bin_N[chosen] = 1.0
        agreed = [table.row_sums(in_bin_N * s.agrees_N) for s in table.scores.values()]
        sums = np.stack([table.row_sums(in_bin_N), *agreed], axis=1)
        sums = sums[sums[:, 0] > 0]
        columns = [(name, "agreement") for name in table.scores]
        points, replicates = _figures(sums.sum(0)[None], columns), _figures(bootstrap_sums(sums), columns)
        entropies = table.entropy_N[chosen]
        bins.append(
            EntropyBin(
                low=float(entropies[0]),
                high=float(entropies[-1]),
                mean=float(entropies.mean()),
                n_rows=len(sums),
                n_positions=len(chosen),
                agreement={
                    name: estimate(points[name, key][0], replicates[name, key], len(sums)) for name, key in columns
                },
            )
        )
    return tuple(bins)


def kept_mass(rows: Sequence[CapturedRow]) -> tuple[float, ...]:
    """Mean probability of the first j stored ids of a position, for j = 1..K.

    A position that holds fewer than j ids counts with all it holds.
    """
    k = max(int(row.targets.kept_P.max(initial=0)) for row in rows)
    total_K, n_positions = np.zeros(k), 0
    for row in rows:
        _, logprobs_PK = row.targets.normalized().padded(k)
        total_K += np.exp(logprobs_PK, dtype=np.float64).cumsum(axis=1).sum(axis=0)
        n_positions += row.targets.n_positions
    return tuple(float(mass) for mass in total_K / n_positions)
