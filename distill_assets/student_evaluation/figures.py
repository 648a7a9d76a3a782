"""Positions of all models side by side, and the figures made of them.

Legend: R = rows, N = supervised positions of all of them, C = columns of sums, S = replicates,
K = most ids kept. Every position counts once; a row's training weight plays no part here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distill_assets.student_evaluation.bootstrap import Columns, Estimate, Resampled, estimate
from distill_assets.student_evaluation.calibration import Calibration, calibration_error
from distill_assets.student_evaluation.identity import CONTROL, STUDENT, TEACHER
from distill_assets.student_evaluation.metrics import METRICS, RECORD_METRICS, Metric
from distill_assets.student_evaluation.scoring import PositionScores
from distill_assets.teacher_capture.sparse_targets import CapturedRow

MOST_BINS = 8
FEWEST_IN_BIN = 25  # positions; fewer make an agreement that jumps by 4 points at each of them

Figures = Mapping[str, Estimate | None]


@dataclass(frozen=True)
class GapShare:
    """How much of the way from the control to the teacher the student went, by one measure in nats.

    `gap_nats` is control minus teacher, `share` (control - student) / gap, from the same replicates:
    1 is the teacher, 0 the control, below 0 worse than the control. None unless the gap's whole
    interval lies above zero: a share of a gap that may not be there says nothing.
    """

    measure: Literal["kl", "nll"]
    gap_nats: Estimate
    share: Estimate | None


@dataclass(frozen=True)
class Scope:
    """The figures on some rows: all held-out rows, or those of one shard.

    `models` holds a figure per metric of each model, teacher last; None where nothing can tell.
    `differences` holds student minus that other model, paired (the same rows in each replicate).
    `closed` holds shares of the gap between control and teacher, where there is a control.
    """

    name: str
    n_rows: int
    n_positions: int
    models: Mapping[str, Figures]
    differences: Mapping[str, Mapping[str, Estimate]]
    closed: tuple[GapShare, ...] = ()


@dataclass(frozen=True)
class EntropyBin:
    """Agreement and KL of each model where the teacher's entropy lies in [low, high] nats.

    The KL is the dense one where there is one, else that on K + 1 outcomes. What ends in `difference` is
    student minus that other model, paired as in a `Scope`.
    """

    low_nats: float
    high_nats: float
    mean_nats: float
    n_rows: int
    n_positions: int
    agreement_share: Mapping[str, Estimate]
    kl_nats: Mapping[str, Estimate]
    agreement_difference: Mapping[str, Estimate]
    kl_difference: Mapping[str, Estimate]


@dataclass(frozen=True)
class PositionTable:
    """Every supervised position: its row, its slot in that row, and what each model made of it.

    The teacher is among `scores` where its whole distribution was computed again.
    """

    rows: Sequence[CapturedRow]
    row_N: NDArray[np.int64]
    slot_N: NDArray[np.int64]
    entropy_N: NDArray[np.float64]
    gold_logprob_N: NDArray[np.float64]
    scores: Mapping[str, PositionScores]

    @classmethod
    def of(cls, rows: Sequence[CapturedRow], scores: Mapping[str, PositionScores]) -> PositionTable:
        counts = [row.targets.n_positions for row in rows]
        return cls(
            rows=rows,
            row_N=np.repeat(np.arange(len(rows)), counts),
            slot_N=np.concatenate([np.arange(count) for count in counts]),
            entropy_N=np.concatenate([row.targets.entropy_P for row in rows]).astype(np.float64),
            gold_logprob_N=np.concatenate([row.targets.gold_logprob_P for row in rows]).astype(np.float64),
            scores=scores,
        )

    @property
    def is_dense(self) -> bool:
        return TEACHER in self.scores

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What is measured here."""
        return METRICS if self.is_dense else RECORD_METRICS

    @property
    def students(self) -> list[str]:
        """All models but the teacher."""
        return [name for name in self.scores if name != TEACHER]

    def row_sums(self, values_N: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(self.row_N, weights=values_N, minlength=len(self.rows)).astype(np.float64, copy=False)

    def columns(self) -> dict[tuple[str, str], NDArray[Any]]:
        """What each (model, metric) sums over the positions [N]."""
        values = {
            (model, m.key): values_N
            for model, s in self.scores.items()
            for m in self.metrics
            if (values_N := getattr(s, m.column)) is not None
        }
        if not self.is_dense and np.isfinite(self.gold_logprob_N).all():  # a capture from elsewhere need not have it
            values[TEACHER, "perplexity"] = -self.gold_logprob_N
        return values

    def scope(self, name: str, rows_R: NDArray[np.bool_]) -> Scope:
        """Figures, differences and intervals on the rows marked."""
        values = self.columns()
        sums = np.stack([self.row_sums(np.ones(len(self.row_N))), *map(self.row_sums, values.values())], axis=1)
        found = Resampled.of(sums[rows_R], list(values))

        def figure(model: str, metric: Metric) -> Estimate | None:
            if (model, metric.key) in values:
                return found.figure(model, metric.key)
            return None if metric.ideal is None else Estimate(metric.ideal, None, None)

        names = [*self.students, TEACHER]
        others = [other for other in self.students if other != STUDENT]
        return Scope(
            name,
            found.n_rows,
            found.n_positions,
            models={name: {m.key: figure(name, m) for m in self.metrics} for name in names},
            differences={
                other: {m.key: found.difference(STUDENT, other, m.key) for m in self.metrics} for other in others
            },
            closed=gap_shares(found, self.is_dense) if CONTROL in self.scores else (),
        )

    def calibration(self) -> dict[str, Calibration]:
        """Of each model that has a temperature, on the half of the rows it was not fitted on."""
        found = {}
        for name in [*self.students, *([TEACHER] if self.is_dense else [])]:
            s = self.scores[name]
            judged_N = np.isfinite(s.tempered_N)
            if judged_N.any():
                found[name] = Calibration(
                    temperature=s.temperature,
                    ece_share=calibration_error(s.top_probabilities_NS[judged_N, 0], s.right_N[judged_N]),
                    tempered_ece_share=calibration_error(s.tempered_N[judged_N], s.right_N[judged_N]),
                    n_fitted_positions=int((~judged_N).sum()),
                    n_rows=len(np.unique(self.row_N[judged_N])),
                    n_positions=int(judged_N.sum()),
                )
        return found


def gap_shares(found: Resampled, is_dense: bool) -> tuple[GapShare, ...]:
    """The share of the gap closed by KL, and by negative log-likelihood where the teacher's is known."""
    key = "dense_kl_nats" if is_dense else "kl_nats"

    def nats(columns: Columns) -> dict[str, list[NDArray[np.float64]]]:
        """Control, student and teacher by each measure."""
        kl = [columns[CONTROL, key], columns[STUDENT, key]]
        measured = {"kl": [*kl, np.zeros_like(kl[0])]}  # the teacher is no distance from itself
        if (TEACHER, "perplexity") in columns:
            measured["nll"] = [np.log(columns[name, "perplexity"]) for name in (CONTROL, STUDENT, TEACHER)]
        return measured

    shares = []
    drawn = nats(found.replicates)
    for measure, (control, student, teacher) in nats(found.points).items():
        control_S, student_S, teacher_S = drawn[measure]
        gap = estimate((control - teacher)[0], control_S - teacher_S, found.n_rows)
        share = None
        if gap.sign > 0:
            share_S = (control_S - student_S) / (control_S - teacher_S)
            share = estimate(((control - student) / (control - teacher))[0], share_S, found.n_rows)
        shares.append(GapShare(measure, gap, share))  # type: ignore[arg-type]
    return tuple(shares)


def entropy_bins(table: PositionTable) -> tuple[EntropyBin, ...]:
    """Equally filled bins of the positions whose entropy is known, by rising entropy."""
    known = np.flatnonzero(np.isfinite(table.entropy_N))
    by_entropy = known[np.argsort(table.entropy_N[known], kind="stable")]
    n_bins = min(MOST_BINS, len(by_entropy) // FEWEST_IN_BIN)
    return tuple(_entropy_bin(table, chosen) for chosen in (np.array_split(by_entropy, n_bins) if n_bins else []))


def _entropy_bin(table: PositionTable, chosen: NDArray[np.int64]) -> EntropyBin:
    """The bin of the positions `chosen`, which are in the order of their entropy."""
    agrees, kl = "agrees_N", "dense_kl_N" if table.is_dense else "kl_N"
    in_bin_N = np.zeros(len(table.row_N))
    in_bin_N[chosen] = 1.0
    values = {(model, c): getattr(table.scores[model], c) for model in table.students for c in (agrees, kl)}
    sums = np.stack([table.row_sums(in_bin_N), *(table.row_sums(in_bin_N * v) for v in values.values())], axis=1)
    found = Resampled.of(sums, list(values))
    entropies, others = table.entropy_N[chosen], [model for model in table.students if model != STUDENT]
    return EntropyBin(
        low_nats=float(entropies[0]),
        high_nats=float(entropies[-1]),
        mean_nats=float(entropies.mean()),
        n_rows=found.n_rows,
        n_positions=found.n_positions,
        agreement_share={model: found.figure(model, agrees) for model in table.students},
        kl_nats={model: found.figure(model, kl) for model in table.students},
        agreement_difference={other: found.difference(STUDENT, other, agrees) for other in others},
        kl_difference={other: found.difference(STUDENT, other, kl) for other in others},
    )


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


def kept_ids(rows: Sequence[CapturedRow]) -> float:
    """Mean number of ids stored at a position."""
    kept_N = np.concatenate([row.targets.kept_P for row in rows])
    return float(kept_N.mean())
