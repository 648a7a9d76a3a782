"""The ids a student's softmax is over, and captured rows cut down to them.

Legend: P = supervised positions of a row, N = kept ids of a row (see sparse_targets).

Teacher and student may differ in ids one of them has no token for (verdicts `padded`, `subset`).
Those never take part: they leave the support and what remains is a distribution of its own; a
position whose gold token is among them is not supervised; a row is cut before a token the student
has no embedding for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from distill_assets.foundation.errors import TrainingError
from distill_assets.foundation.tokenizers import TokenIds
from distill_assets.teacher_capture.sparse_targets import CapturedRow, SparseTargets


@dataclass(frozen=True)
class StudentVocabulary(TokenIds):
    """The outcomes of the student's softmax."""

    def has(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of `ids` are outcomes."""
        return (ids < self.n_real) & ~np.isin(ids, self.unused)


def shared_vocabulary(teacher: TokenIds, student: TokenIds | None, head_width: int) -> StudentVocabulary:
    """Ids with a token on both sides and a row in the student's head.

    `student` is None for one made from teacher layers or a configuration: it has the teacher's
    tokenizer. That an id means the same on both sides is the tokenizer check's business.
    """
    shared = teacher.below(head_width)
    if student is not None:
        shared &= student.below(head_width)
    if not shared:
        raise TrainingError("teacher and student share no token id; use a pair of one family")
    n_real = max(shared) + 1
    return StudentVocabulary(n_real, tuple(i for i in range(n_real) if i not in shared))


@dataclass(frozen=True)
class FitReport:
    """What a smaller student vocabulary cost. All zero when the student has every id."""

    positions_dropped: int  # gold token unknown to the student, or behind a cut
    rows_cut: int  # rows that contain a token the student has no embedding for
    rows_dropped: int  # rows left without a supervised position
    mass_dropped: float  # mean probability, over all positions given, of kept ids the student lacks


def fit_rows(
    rows: Sequence[CapturedRow], vocabulary: StudentVocabulary, n_embeddings: int
) -> tuple[list[CapturedRow], FitReport]:
    """Rows whose targets lie in `vocabulary` and whose tokens lie below `n_embeddings`, in order.

    A row that already does is handed on as it is. Log-probabilities stay as stored; a reader's
    log-sum-exp over what is left renormalises them. Weights of what is left grow to the sum that
    all had; tail samples that are not in `vocabulary` are left out.
    """
    fitted: list[CapturedRow] = []
    dropped = cut = 0
    lost = 0.0
    for row in rows:
        if not row.targets.n_positions:
            continue
        fits = bool((row.input_ids < n_embeddings).all())
        full = int(row.targets.kept_P.max()) >= len(vocabulary)  # nothing of the student's is left for a tail
        if not fits or full or not vocabulary.has(_mentioned(row)).all():
            within = _within(vocabulary, row.targets)
            lost += _lost_mass(row.targets, within)
            row = _fit(replace(row, targets=within), vocabulary, n_embeddings)
            dropped += within.n_positions - row.targets.n_positions
            cut += not fits
        if row.targets.n_positions:
            fitted.append(row)
    report = FitReport(
        positions_dropped=dropped,
        rows_cut=cut,
        rows_dropped=len(rows) - len(fitted),
        mass_dropped=lost / max(1, sum(row.targets.n_positions for row in rows)),
    )
    return fitted, report


def _mentioned(row: CapturedRow) -> NDArray[np.int32]:
    targets = row.targets
    drawn = [] if targets.tail_sample_ids_PS is None else [targets.tail_sample_ids_M]
    return np.concatenate([targets.support_ids_N, row.input_ids[targets.positions_P + 1], *drawn])


def _fit(row: CapturedRow, vocabulary: StudentVocabulary, n_embeddings: int) -> CapturedRow:
    strange = np.flatnonzero(row.input_ids >= n_embeddings)
    length = int(strange[0]) if len(strange) else len(row.input_ids)
    targets = row.targets
    gold_P = row.input_ids[targets.positions_P + 1]
    stays_P = (targets.positions_P < length - 1) & vocabulary.has(gold_P)
    weights_P = None if row.position_weights is None else row.position_weights[stays_P]
    return replace(row, input_ids=row.input_ids[:length], targets=targets.at(stays_P), position_weights=weights_P)


def _within(vocabulary: StudentVocabulary, targets: SparseTargets) -> SparseTargets:
    """`targets` with only the ids of `vocabulary`.

    A position left without any id keeps one slot of log-probability -inf and all its mass in the
    tail: the teacher says nothing there but "one of your ids", which costs every student nothing, and what its tail
    samples among these ids say.
    """
    if not targets.n_positions:
        return targets
    has_N = vocabulary.has(targets.support_ids_N)
    left_P = np.add.reduceat(has_N.astype(np.int64), targets.offsets_P1[:-1])
    emptied_P = left_P == 0
    stays_N = has_N.copy()
    stays_N[targets.offsets_P1[:-1][emptied_P]] = True
    logprobs_N = np.where(has_N, targets.support_logprobs_N, np.float32(-np.inf))
    tail_P = np.where(emptied_P, np.float32(0.0), targets.tail_logprob_P)
    tail_P = np.where(left_P == len(vocabulary), np.float32(-np.inf), tail_P)  # no id of the student is outside
    weights_N, drawn_PS = targets.weights_N, targets.tail_sample_ids_PS
    return replace(
        targets,
        offsets_P1=np.concatenate([[0], np.maximum(left_P, 1).cumsum()]).astype(np.int64),
        support_ids_N=targets.support_ids_N[stays_N],
        support_logprobs_N=logprobs_N[stays_N],
        tail_logprob_P=tail_P,
        weights_N=None if weights_N is None else _regrown(weights_N, has_N, targets.offsets_P1)[stays_N],
        tail_sample_ids_PS=None if drawn_PS is None else np.where(vocabulary.has(drawn_PS), drawn_PS, np.int32(-1)),
    )


def _regrown(
    weights_N: NDArray[np.float32], has_N: NDArray[np.bool_], offsets_P1: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Weights, 0 outside `has_N`, with the sum of each position as it was; all 0 where none is left."""
    left_N = np.where(has_N, weights_N, 0.0).astype(np.float64)
    left_P = np.add.reduceat(left_N, offsets_P1[:-1])
    growth_P = np.add.reduceat(weights_N, offsets_P1[:-1]) / np.where(left_P > 0, left_P, 1.0)
    return (left_N * np.repeat(growth_P, np.diff(offsets_P1))).astype(np.float32)


def _lost_mass(targets: SparseTargets, within: SparseTargets) -> float:
    """Sum over positions of the normalised probability that was taken out."""
    emptied_P = np.isneginf(within.support_logprobs_N[within.offsets_P1[:-1]])
    after_P = np.where(emptied_P, -np.inf, within.log_total_mass_P())
    return float((1.0 - np.exp(after_P - targets.log_total_mass_P().astype(np.float64))).sum())
