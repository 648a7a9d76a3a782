"""Figures on the whole vocabulary against loops over dense float64 distributions."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from distill_assets.foundation.language_model import HEAD_ROWS
from distill_assets.student_evaluation.bootstrap import bootstrap_sums
from distill_assets.student_evaluation.dense import DenseTeacher
from distill_assets.student_evaluation.evaluation import Evaluation
from distill_assets.student_evaluation.scoring import PositionScores, score_model
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.teacher import Teacher
from tests.devices import DEVICES
from tests.student_evaluation.capturing import dense_logprobs, random_rows


def loaded(teacher: PreTrainedModel, n_real: int) -> Teacher:
    return Teacher(teacher, n_real, torch.tensor([], dtype=torch.int64, device=teacher.device))


def naive(log_p: np.ndarray, log_q: np.ndarray) -> tuple[float, float, float, float]:
    """(KL, reverse KL, top-5 agreement, acceptance) of two distributions, id by id."""
    pairs = [(math.exp(a), math.exp(b)) for a, b in zip(log_p, log_q, strict=True)]
    five_p, five_q = (set(np.argsort(-x, kind="stable")[:5].tolist()) for x in (log_p, log_q))
    return (
        sum(p * math.log(p / q) for p, q in pairs),
        sum(q * math.log(q / p) for p, q in pairs),
        len(five_p & five_q) / 5,
        1 - sum(abs(p - q) for p, q in pairs) / 2,
    )


def without(log_TV: np.ndarray, ids: list[int]) -> np.ndarray:
    """The distributions without these ids, what is left renormalised."""
    left = np.delete(log_TV, ids, axis=1)
    return left - np.log(np.exp(left).sum(axis=1, keepdims=True))


def check(
    scores: PositionScores,
    teacher: PreTrainedModel,
    model: PreTrainedModel,
    rows: list[CapturedRow],
    v: StudentVocabulary,
) -> None:
    expected = []
    for row in rows:
        log_p, log_q = (without(dense_logprobs(m, row.input_ids, v.n_real), list(v.unused)) for m in (teacher, model))
        expected += [naive(log_p[t], log_q[t]) for t in row.targets.positions_P]
    kl, reverse, top5, acceptance = zip(*expected, strict=True)
    np.testing.assert_allclose(scores.dense_kl_N, kl, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    np.testing.assert_allclose(scores.dense_reverse_kl_N, reverse, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    np.testing.assert_allclose(scores.dense_top5_N, top5, atol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_allclose(scores.dense_acceptance_N, acceptance, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_equals_the_loops(teacher: PreTrainedModel, student: PreTrainedModel, n_real: int, device: str) -> None:
    """Rows of several batches, longer than one chunk of the head; batches of teacher and student differ."""
    rows = random_rows(teacher, 7, k=5, n_real=n_real, lengths=(60, 90))
    assert sum(row.targets.n_positions for row in rows) > HEAD_ROWS
    v = StudentVocabulary(n_real)
    there = [copy.deepcopy(model).to(device) for model in (teacher, student)]  # type: ignore[arg-type]
    dense = DenseTeacher.of(loaded(there[0], n_real), rows, v, batch_tokens=300)
    scores = score_model(there[1], rows, v, dense=dense, batch_tokens=100)
    check(scores, teacher, student, rows, v)
    assert scores.dense_kl_N is not None and scores.dense_kl_N.mean() > 0.05
    assert (scores.dense_kl_N >= scores.kl_N - 1e-5).all()  # what the K + 1 figure claims to be: a lower bound
    assert scores.dense_acceptance_N is not None and (scores.dense_acceptance_N <= scores.acceptance_N + 1e-5).all()


def test_ids_that_one_side_lacks_take_no_part(teacher: PreTrainedModel, stranger: PreTrainedModel, n_real: int) -> None:
    """The stranger's head is padded, and neither side may use some ids; what is left is renormalised."""
    rows = random_rows(teacher, 2, k=4, n_real=n_real)
    taken = {int(i) for row in rows for i in [*row.targets.support_ids_N, *row.input_ids]}
    v = StudentVocabulary(n_real, tuple(i for i in range(200, 300) if i not in taken)[:40])
    scores = score_model(stranger, rows, v, dense=DenseTeacher.of(loaded(teacher, n_real), rows, v))
    check(scores, teacher, stranger, rows, v)


def test_without_a_teacher_there_are_none(teacher: PreTrainedModel, student: PreTrainedModel, n_real: int) -> None:
    scores = score_model(student, random_rows(teacher, 2, k=4, n_real=n_real), StudentVocabulary(n_real))
    assert scores.dense_kl_N is None and scores.dense_top5_N is None


def test_the_teacher_stands_beside_its_record(dense_evaluation: Evaluation) -> None:
    """Dense, it is what it is by definition; against its record, what it is measured to be."""
    figures = {key: e for key, e in dense_evaluation.overall.models["teacher"].items() if e is not None}
    assert (figures["dense_kl_nats"].value, figures["dense_top5_share"].value) == (0.0, 1.0)
    assert figures["kl_nats"].value == pytest.approx(0, abs=1e-5) and figures["kl_nats"].low is not None
    assert figures["perplexity"].low is not None
    assert list(dense_evaluation.overall.models) == ["untrained", "student", "control", "teacher"]
    assert set(dense_evaluation.overall.differences) == {"untrained", "control"}


def test_the_dense_kl_decides(dense_evaluation: Evaluation, evaluation: Evaluation) -> None:
    assert (dense_evaluation.outcome, dense_evaluation.kl.key) == ("closer", "dense_kl_nats")
    assert evaluation.kl.key == "kl_nats" and "dense_kl_nats" not in evaluation.overall.models["student"]
    for key in ("kl_nats", "perplexity", "acceptance_share", "agreement_share"):  # the teacher changes no other figure
        assert dense_evaluation.overall.models["student"][key] == evaluation.overall.models["student"][key]


def test_shares_of_the_gap_by_hand(dense_evaluation: Evaluation) -> None:
    """Both shares from the sums kept by row; the interval from the very replicates of numerator and denominator."""
    r = dense_evaluation.per_row
    for closed, key in zip(dense_evaluation.overall.closed, ("dense_kl_nats", "perplexity"), strict=True):
        control, student = (r.sums[model, key] for model in ("control", "student"))
        teacher = r.sums["teacher", key] if key == "perplexity" else np.zeros_like(control)
        drawn = bootstrap_sums(np.stack([r.positions_R, control, student, teacher], axis=1))
        gap_S = (drawn[:, 1] - drawn[:, 3]) / drawn[:, 0]
        assert closed.gap_nats.value == pytest.approx((control - teacher).sum() / r.positions_R.sum())
        assert closed.gap_nats.low == pytest.approx(np.quantile(gap_S, 0.025))
        if closed.gap_nats.sign > 0:
            share_S = (drawn[:, 1] - drawn[:, 2]) / (drawn[:, 1] - drawn[:, 3])
            assert closed.share is not None
            assert closed.share.value == pytest.approx((control - student).sum() / (control - teacher).sum())
            assert (closed.share.low, closed.share.high) == pytest.approx(tuple(np.quantile(share_S, [0.025, 0.975])))
        else:
            assert closed.share is None  # random rows: the teacher is no better at them than the control
    assert [closed.measure for closed in dense_evaluation.overall.closed] == ["kl", "nll"]
    assert (
        dense_evaluation.overall.closed[0].share is not None
        and 0.5 < dense_evaluation.overall.closed[0].share.value < 1
    )
    assert all(len(scope.closed) == 2 for scope in dense_evaluation.shards)


def test_kl_by_entropy_is_dense_and_adds_up(dense_evaluation: Evaluation) -> None:
    bins, n = dense_evaluation.entropy_bins, dense_evaluation.overall.n_positions
    overall = dense_evaluation.overall.models["control"]["dense_kl_nats"]
    weighted = sum(b.kl_nats["control"].value * b.n_positions for b in bins) / n
    assert overall is not None and weighted == pytest.approx(overall.value)
    assert "teacher" not in bins[0].kl_nats
