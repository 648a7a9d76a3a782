"""The stored distribution read back: one log-sum-exp over the K+1 values, rounding included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_assets.teacher_capture.sparse_targets import (
    SparseDistributions,
    SparseTargets,
    decode_logprobs,
    encode_logprobs,
)


def targets(support: Sequence[Sequence[float]], tails: Sequence[float]) -> SparseTargets:
    """Positions with these support probabilities and tail probabilities."""
    kept = [len(p) for p in support]
    flat = np.log(np.array([p for position in support for p in position], dtype=np.float32))
    with np.errstate(divide="ignore"):
        tail = np.log(np.array(tails, dtype=np.float32))
    n = len(support)
    return SparseTargets(
        positions_P=np.arange(n, dtype=np.int32),
        offsets_P1=np.concatenate([[0], np.cumsum(kept)]).astype(np.int64),
        support_ids_N=np.arange(len(flat), dtype=np.int32),
        support_logprobs_N=flat,
        tail_logprob_P=tail,
        gold_logprob_P=np.zeros(n, dtype=np.float32),
        entropy_P=np.zeros(n, dtype=np.float32),
    )


def test_normalized_sums_to_one_whatever_rounding_did() -> None:
    rounded = targets([[0.6, 0.3], [0.5]], [0.12, 0.49])  # sums 1.02 and 0.99
    normal = rounded.normalized()
    first = np.exp(normal.support_logprobs_N[:2]).sum() + np.exp(normal.tail_logprob_P[0])
    second = np.exp(normal.support_logprobs_N[2]) + np.exp(normal.tail_logprob_P[1])
    assert np.allclose([first, second], 1.0, atol=1e-6)
    assert np.isclose(np.exp(normal.support_logprobs_N[0]), 0.6 / 1.02, atol=1e-6)
    assert np.allclose(rounded.kept_mass_P(), [0.9 / 1.02, 0.5 / 0.99], atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, -50.0, -90.0, -1000.0, 200.0])
@pytest.mark.parametrize("kept", [(3, 3, 3), (4, 1, 2)])
def test_the_mass_is_that_of_float64_however_far_from_one(shift: float, kept: Sequence[int]) -> None:
    logprobs = [np.float32(shift) - np.linspace(0, 9, k, dtype=np.float32) for k in kept]
    tails = np.array([shift - 1, shift + 2, -np.inf], dtype=np.float32)  # the last has none
    stored = replace(
        targets([[0.1] * k for k in kept], [0.1] * 3),
        support_logprobs_N=np.concatenate(logprobs),
        tail_logprob_P=tails,
    )
    expected = [
        np.logaddexp.reduce(np.append(values, tail).astype(np.float64))
        for values, tail in zip(logprobs, tails, strict=True)
    ]
    np.testing.assert_allclose(stored.log_total_mass_P(), expected, rtol=3e-7, atol=3e-7)


def test_rows_that_are_joined_keep_their_positions_apart() -> None:
    parts = [targets([[0.6, 0.3], [0.5]], [0.1, 0.5]), targets([[0.4]], [0.6]), targets([[0.2, 0.1, 0.1]], [0.6])]
    whole = SparseDistributions.joined(parts)
    assert whole.offsets_P1.tolist() == [0, 2, 3, 4, 7]
    assert whole.support_ids_N.tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert np.allclose(np.exp(whole.support_logprobs_N), [0.6, 0.3, 0.5, 0.4, 0.2, 0.1, 0.1])
    assert np.allclose(np.exp(whole.tail_logprob_P), [0.1, 0.5, 0.6, 0.6])
    assert whole.weights_N is None and parts[0].offsets_P1.tolist() == [0, 2, 3]


def test_no_tail_contributes_nothing() -> None:
    whole = targets([[0.5, 0.25, 0.25]], [0.0])
    assert np.isneginf(whole.normalized().tail_logprob_P[0])
    assert whole.kept_mass_P()[0] == 1.0


def test_padded_marks_empty_slots_with_minus_infinity() -> None:
    ids_PK, logprobs_PK = targets([[0.6, 0.3], [0.5]], [0.1, 0.5]).padded(3)
    assert ids_PK.tolist() == [[0, 1, 0], [2, 0, 0]]
    assert np.isneginf(logprobs_PK).tolist() == [[False, False, True], [False, True, True]]


def test_padded_loses_nothing() -> None:
    with pytest.raises(ValueError, match="keeps 3 ids, more than 2"):
        targets([[0.6, 0.3, 0.05], [0.5]], [0.05, 0.5]).padded(2)  # as many ids as there are places


@given(st.lists(st.floats(min_value=-15.875, max_value=0.0, width=32), min_size=1))
def test_compact_code_is_within_half_a_step(values: list[float]) -> None:
    logprobs = np.array(values, dtype=np.float32)
    assert np.abs(decode_logprobs(encode_logprobs(logprobs)) - logprobs).max() <= 1 / 32 + 1e-6


def test_compact_code_saturates_and_is_stable() -> None:
    assert encode_logprobs(np.array([-40.0, 0.0], dtype=np.float32)).tolist() == [255, 0]
    every = np.arange(256, dtype=np.uint8)
    assert (encode_logprobs(decode_logprobs(every)) == every).all()  # reused rows are written again without loss
