"""Ids the student lacks: out of the support, out of the gold, out of the tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from distill_assets.foundation.errors import TrainingError
from distill_assets.foundation.tokenizers import TokenIds
from distill_assets.student_model.vocabulary import StudentVocabulary, fit_rows, shared_vocabulary
from tests import tiny
from tests.student_model.rows import row_of

MANY = 100


def test_a_row_within_the_vocabulary_is_handed_on_as_it_is() -> None:
    row = row_of([1, 2, 3], [0, 1], [{2: 0.9}, {3: 0.5, 1: 0.3}], [0.1, 0.2])
    fitted, report = fit_rows([row], StudentVocabulary(10), MANY)
    assert fitted[0] is row
    assert (report.positions_dropped, report.rows_cut, report.rows_dropped, report.mass_dropped) == (0, 0, 0, 0.0)


def test_unknown_ids_leave_the_support_and_the_rest_is_renormalised() -> None:
    row = row_of([1, 2, 3], [0, 1], [{2: 0.6, 9: 0.2, 3: 0.1}, {3: 0.5, 1: 0.4}], [0.1, 0.1])
    (fitted,), report = fit_rows([row], StudentVocabulary(9), MANY)
    targets = fitted.targets.normalized()
    assert targets.support_ids_N.tolist() == [2, 3, 3, 1]
    np.testing.assert_allclose(np.exp(targets.support_logprobs_N), [0.75, 0.125, 0.5, 0.4], rtol=1e-6)
    np.testing.assert_allclose(np.exp(targets.tail_logprob_P), [0.125, 0.1], rtol=1e-6)
    assert report.mass_dropped == pytest.approx(0.1)  # 0.2 at one of two positions


def test_positions_that_lose_nothing_add_nothing_to_the_mass_that_was_dropped() -> None:
    random = np.random.default_rng(0)
    positions = [dict(zip(range(16), random.dirichlet(np.ones(16)) * 0.9, strict=True)) for _ in range(300)]
    positions[7][99] = 1e-7
    row = row_of([1] * 301, list(range(300)), positions, [0.1] * 300)
    _, report = fit_rows([row], StudentVocabulary(50), MANY)
    assert report.mass_dropped * 300 == pytest.approx(1e-7, rel=0.1)


def test_an_unused_id_below_the_limit_counts_as_unknown() -> None:
    row = row_of([1, 2], [0], [{4: 0.5, 2: 0.3}], [0.2])
    (fitted,), _ = fit_rows([row], StudentVocabulary(10, unused=(4, 7)), MANY)
    assert fitted.targets.support_ids_N.tolist() == [2]


def test_a_gold_token_the_student_lacks_makes_its_position_unsupervised() -> None:
    row = row_of([1, 9, 3, 2], [0, 1, 2], [{2: 0.9}, {3: 0.9}, {2: 0.8}], [0.1, 0.1, 0.2])
    (fitted,), report = fit_rows([row], StudentVocabulary(9), MANY)
    assert fitted.targets.positions_P.tolist() == [1, 2]
    assert fitted.input_ids.tolist() == [1, 9, 3, 2]  # the token itself is still read
    assert report.positions_dropped == 1


def test_a_row_is_cut_before_a_token_without_an_embedding() -> None:
    row = row_of([1, 2, 9, 3], [0, 1, 2], [{2: 0.9}, {3: 0.9}, {3: 0.9}], [0.1, 0.1, 0.1])
    gone = row_of([9, 2], [0], [{2: 0.9}], [0.1])
    (fitted,), report = fit_rows([row, gone], StudentVocabulary(9), 9)
    assert fitted.input_ids.tolist() == [1, 2]
    assert fitted.targets.positions_P.tolist() == [0]
    assert (report.positions_dropped, report.rows_cut, report.rows_dropped) == (3, 2, 1)


def test_a_position_without_any_known_id_stays_supervised_with_all_mass_in_the_tail() -> None:
    row = row_of([1, 2, 3], [0, 1], [{9: 1.0}, {3: 0.9}], [0.0, 0.1])
    (fitted,), report = fit_rows([row], StudentVocabulary(9), MANY)
    targets = fitted.targets.normalized()
    assert targets.positions_P.tolist() == [0, 1]
    assert np.exp(targets.tail_logprob_P).tolist() == pytest.approx([1.0, 0.1])
    assert np.exp(targets.support_logprobs_N).tolist() == pytest.approx([0.0, 0.9])
    assert report.mass_dropped == pytest.approx(0.5)


def test_a_tail_without_any_id_of_the_student_is_taken_out() -> None:
    row = row_of([1, 2], [0], [{2: 0.5, 0: 0.2, 1: 0.1}], [0.2])
    (fitted,), report = fit_rows([row], StudentVocabulary(3), MANY)
    targets = fitted.targets.normalized()
    assert np.isneginf(targets.tail_logprob_P).all()
    np.testing.assert_allclose(np.exp(targets.support_logprobs_N), [0.625, 0.25, 0.125], rtol=1e-6)
    assert report.mass_dropped == pytest.approx(0.2)


def test_shared_vocabulary_is_what_both_tokenizers_and_the_head_have(tokenizer: PreTrainedTokenizerFast) -> None:
    n, teacher = len(tokenizer), TokenIds.of(tokenizer)
    assert shared_vocabulary(teacher, None, n + 64) == StudentVocabulary(n)
    assert shared_vocabulary(teacher, None, n - 5) == StudentVocabulary(n - 5)
    assert shared_vocabulary(teacher, TokenIds.of(tiny.train_tokenizer(vocab_size=300)), n) == StudentVocabulary(300)
    assert shared_vocabulary(TokenIds(9, (2, 5)), TokenIds(8, (5, 6)), 99) == StudentVocabulary(8, (2, 5, 6))
    with pytest.raises(TrainingError, match="share no token id"):
        shared_vocabulary(teacher, None, 0)


def test_weights_of_what_is_left_grow_to_the_sum_all_had() -> None:
    row = row_of([1, 2, 3, 4], [0, 1, 2], [{2: 0.5, 9: 0.3, 3: 0.1}, {9: 0.8, 4: 0.1}, {4: 0.9}], [0.1, 0.1, 0.1])
    weights = np.array([0.4, 0.2, 0.2, 0.8, 0.0, 0.7], dtype=np.float32)
    row = replace(row, targets=replace(row.targets, weights_N=weights))
    (fitted,), _ = fit_rows([row], StudentVocabulary(9), MANY)
    assert fitted.targets.support_ids_N.tolist() == [2, 3, 4, 4]
    assert fitted.targets.weights_N is not None
    np.testing.assert_allclose(fitted.targets.weights_N, [0.8 * 2 / 3, 0.8 / 3, 0.0, 0.7], rtol=1e-6)


def test_a_position_that_goes_takes_its_weight_along() -> None:
    row = row_of([1, 9, 3, 4], [0, 1, 2], [{2: 0.9}, {3: 0.9}, {4: 0.9}], [0.1] * 3)
    row = replace(row, position_weights=np.array([0.5, 2.0, 3.0], dtype=np.float32))
    (fitted,), _ = fit_rows([row], StudentVocabulary(9), MANY)
    assert fitted.targets.positions_P.tolist() == [1, 2]
    assert fitted.position_weights is not None and fitted.position_weights.tolist() == [2.0, 3.0]


def test_a_position_without_any_known_id_learns_nothing_from_weights() -> None:
    row = row_of([1, 2, 3], [0, 1], [{9: 0.9}, {3: 0.9}], [0.1, 0.1])
    row = replace(row, targets=replace(row.targets, weights_N=np.array([1.0, 0.6], dtype=np.float32)))
    (fitted,), _ = fit_rows([row], StudentVocabulary(9), MANY)
    assert fitted.targets.weights_N is not None and fitted.targets.weights_N.tolist() == pytest.approx([0.0, 0.6])


def test_tail_samples_the_student_lacks_are_left_out() -> None:
    row = row_of([1, 2, 3], [0, 1], [{2: 0.9}, {3: 0.9}], [0.1, 0.1])
    samples_PS = np.array([[9, 5], [-1, -1]], dtype=np.int32)
    row = replace(row, targets=replace(row.targets, tail_sample_ids_PS=samples_PS))
    (fitted,), report = fit_rows([row], StudentVocabulary(9), MANY)
    assert fitted.targets.tail_sample_ids_PS is not None
    assert fitted.targets.tail_sample_ids_PS.tolist() == [[-1, 5], [-1, -1]]
    assert report.mass_dropped == pytest.approx(0.0)
