"""Scores of a model against its own dense logits, in float64, one row and position at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from distill_assets.foundation.errors import IncompatibleTokenizers, TrainingError
from distill_assets.foundation.language_model import HEAD_ROWS
from distill_assets.foundation.progress import Progress
from distill_assets.student_evaluation.scoring import SHOWN, PositionScores, score_model
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from tests.student_evaluation.capturing import capture_row, dense_logprobs, random_rows
from tests.student_evaluation.conftest import load


def naive(model: PreTrainedModel, row: CapturedRow, n_real: int) -> list[tuple[float, float, bool, float]]:
    """(nll, kl, agrees, acceptance) of each supervised position, by Python loops."""
    logq_TV = dense_logprobs(model, row.input_ids, n_real)
    t = row.targets
    out = []
    for p, position in enumerate(t.positions_P):
        kept = slice(t.offsets_P1[p], t.offsets_P1[p + 1])
        ids, weights = t.support_ids_N[kept], [math.exp(x) for x in t.support_logprobs_N[kept]]
        tail = math.exp(t.tail_logprob_P[p])
        total = sum(weights) + tail
        logq = logq_TV[position]
        rest = sum(math.exp(logq[v]) for v in range(n_real) if v not in set(ids.tolist()))
        outcomes = [(w / total, math.exp(logq[i])) for w, i in zip(weights, ids, strict=True)] + [(tail / total, rest)]
        kl = sum(a * math.log(a / b) for a, b in outcomes if a > 0)
        out.append(
            (
                -float(logq[row.input_ids[position + 1]]),
                kl,
                int(logq.argmax()) == int(ids[0]),
                sum(min(a, b) for a, b in outcomes),
            )
        )
    return out


def check_against_naive(scores: PositionScores, model: PreTrainedModel, rows: list[CapturedRow], n_real: int) -> None:
    expected = [position for row in rows for position in naive(model, row, n_real)]
    nll, kl, agrees, acceptance = zip(*expected, strict=True)
    np.testing.assert_allclose(scores.nll_N, nll, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores.kl_N, kl, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scores.agrees_N, agrees)
    np.testing.assert_allclose(scores.acceptance_N, acceptance, rtol=1e-4, atol=1e-5)


def test_equals_the_loops(teacher: PreTrainedModel, student: PreTrainedModel, n_real: int) -> None:
    rows = random_rows(teacher, 9, k=6, n_real=n_real)
    scores = score_model(student, rows, StudentVocabulary(n_real), batch_tokens=64)
    check_against_naive(scores, student, rows, n_real)
    assert 0.1 < scores.agrees_N.mean() < 1  # neither all nor nothing, so a wrong order would show


def test_a_padded_head_and_rounded_targets(teacher: PreTrainedModel, stranger: PreTrainedModel, n_real: int) -> None:
    rows = [
        replace(row, targets=replace(t, support_logprobs_N=np.round(t.support_logprobs_N * 16) / np.float32(16)))
        for row in random_rows(teacher, 4, k=6, n_real=n_real)
        for t in [row.targets]
    ]
    with torch.no_grad():
        stranger.get_output_embeddings().weight[n_real:] = 9.0  # loud padding must not take part
    check_against_naive(score_model(stranger, rows, StudentVocabulary(n_real)), stranger, rows, n_real)


def test_more_positions_than_one_chunk_and_rows_longer_than_the_budget(
    teacher: PreTrainedModel, student: PreTrainedModel, n_real: int
) -> None:
    rows = random_rows(teacher, 5, k=5, n_real=n_real, lengths=(120, 140))
    assert sum(row.targets.n_positions for row in rows) > 2 * HEAD_ROWS
    for batch_tokens in (50, 100_000):
        check_against_naive(
            score_model(student, rows, StudentVocabulary(n_real), batch_tokens=batch_tokens), student, rows, n_real
        )


def test_the_teacher_is_no_distance_from_itself(teacher: PreTrainedModel, n_real: int) -> None:
    rows = random_rows(teacher, 8, k=8, n_real=n_real)
    scores = score_model(teacher, rows, StudentVocabulary(n_real))
    np.testing.assert_allclose(scores.kl_N, 0, atol=1e-6)
    np.testing.assert_allclose(scores.acceptance_N, 1, atol=1e-5)
    assert scores.agrees_N.all()
    gold = np.concatenate([row.targets.gold_logprob_P for row in rows])
    np.testing.assert_allclose(scores.nll_N, -gold, atol=1e-4)


@pytest.mark.parametrize("shift", [-1, 1])
def test_targets_shifted_by_one_are_far_away(teacher: PreTrainedModel, n_real: int, shift: int) -> None:
    shifted = [
        replace(
            row,
            input_ids=np.append(row.input_ids, np.int32(7)),  # so that the last position has a next token
            targets=replace(row.targets, positions_P=row.targets.positions_P + np.int32(shift)),
        )
        for row in random_rows(teacher, 8, k=8, n_real=n_real)
    ]
    scores = score_model(teacher, shifted, StudentVocabulary(n_real))
    assert scores.kl_N.mean() > 0.5
    assert scores.agrees_N.mean() < 0.6


def test_the_whole_vocabulary_kept_is_dense_kl(teacher: PreTrainedModel, student: PreTrainedModel, n_real: int) -> None:
    row = capture_row(teacher, [6, 40, 99, 7, 12], [0, 1, 2, 3], k=n_real, n_real=n_real)
    assert np.isneginf(row.targets.tail_logprob_P).all()
    logp_TV, logq_TV = (dense_logprobs(model, row.input_ids, n_real)[:4] for model in (teacher, student))
    dense = (np.exp(logp_TV) * (logp_TV - logq_TV)).sum(-1)
    np.testing.assert_allclose(score_model(student, [row], StudentVocabulary(n_real)).kl_N, dense, rtol=1e-4, atol=1e-5)


def test_unused_ids_take_no_mass(teacher: PreTrainedModel, student: PreTrainedModel, n_real: int) -> None:
    row = capture_row(teacher, [6, 40, 99, 7, 12], [0, 1, 2, 3], k=4, n_real=n_real)
    unused = [i for i in range(200, 260) if i not in set(row.targets.support_ids_N.tolist())]
    plain, masked = (
        score_model(student, [row], StudentVocabulary(n_real)),
        score_model(student, [row], StudentVocabulary(n_real, tuple(unused))),
    )
    logq_TV = dense_logprobs(student, row.input_ids, n_real)[:4]
    lost = np.log1p(-np.exp(logq_TV[:, unused]).sum(-1))
    np.testing.assert_allclose(masked.nll_N, plain.nll_N + lost, rtol=1e-4)


def test_likeliest_ids(teacher: PreTrainedModel, student: PreTrainedModel, n_real: int) -> None:
    rows = random_rows(teacher, 3, k=4, n_real=n_real)
    scores = score_model(student, rows, StudentVocabulary(n_real))
    logq = np.concatenate([dense_logprobs(student, r.input_ids, n_real)[r.targets.positions_P] for r in rows])
    best = np.argsort(-logq, axis=1)[:, :SHOWN]
    np.testing.assert_array_equal(scores.top_ids_NS, best)
    np.testing.assert_allclose(scores.top_probabilities_NS, np.exp(np.take_along_axis(logq, best, 1)), rtol=1e-4)


def test_scored_in_evaluation_mode(teacher_folder: Path, teacher: PreTrainedModel, n_real: int) -> None:
    model = load(teacher_folder)
    model.config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    scores = score_model(model, random_rows(teacher, 3, k=4, n_real=n_real), StudentVocabulary(n_real))
    np.testing.assert_allclose(scores.kl_N, 0, atol=1e-6)


def test_progress_ends_with_every_position(teacher: PreTrainedModel, n_real: int) -> None:
    rows = random_rows(teacher, 6, k=4, n_real=n_real)
    seen: list[Progress] = []
    score_model(teacher, rows, StudentVocabulary(n_real), name="student", batch_tokens=40, on_progress=seen.append)
    assert len(seen) > 2
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done == seen[-1].total == sum(row.targets.n_positions for row in rows)
    assert seen[-1].step == "evaluate student"


def test_foreign_ids_and_a_narrow_head_are_refused(teacher: PreTrainedModel, n_real: int) -> None:
    row = capture_row(teacher, [6, 40, 99, 7], [0, 1, 2], k=4, n_real=n_real)
    with pytest.raises(IncompatibleTokenizers, match=r"student has a head of \d+ ids.*distill check"):
        score_model(teacher, [row], StudentVocabulary(n_real + 1), name="student")
    with pytest.raises(IncompatibleTokenizers, match="key key0 holds id 99, which student does not have"):
        score_model(teacher, [row], StudentVocabulary(n_real, (99,)), name="student")
    unfitted = replace(row, input_ids=np.array([n_real + 30, 40, 99, 7], dtype=np.int32))
    with pytest.raises(IncompatibleTokenizers, match=f"holds id {n_real + 30}"):
        score_model(teacher, [unfitted], StudentVocabulary(n_real), name="student")


def test_a_broken_model_is_named_with_the_row(teacher_folder: Path, teacher: PreTrainedModel, n_real: int) -> None:
    rows = random_rows(teacher, 3, k=4, n_real=n_real)
    model = load(teacher_folder)
    ids = [set(row.input_ids[:-1].tolist()) for row in rows]
    only_in_last = min(ids[2] - ids[0] - ids[1])
    with torch.no_grad():
        model.get_input_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.clone())
        model.get_input_embeddings().weight[only_in_last] = float("nan")
    with pytest.raises(
        TrainingError, match="control gives figures that are not finite in the held-out row with key key2"
    ):
        score_model(model, rows, StudentVocabulary(n_real), name="control")
