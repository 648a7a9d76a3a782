"""The plan's promises, and what collation puts where."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_assets.student_model.batches import IGNORED, collate, epoch_ends, plan_batches
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from tests.student_model.rows import row_of


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=60), st.integers(2, 90), st.integers(1, 3), st.integers(0, 9))
def test_every_row_once_an_epoch_within_the_budget(lengths: list[int], budget: int, epochs: int, seed: int) -> None:
    plan = plan_batches(lengths, budget, epochs, seed)
    assert plan == plan_batches(lengths, budget, epochs, seed)
    for batch in plan:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    ends = epoch_ends(plan, [len(lengths)] * epochs)
    assert len(ends) == epochs and ends[-1] == len(plan)
    for start, end in zip([0, *ends], ends, strict=False):
        assert sorted(i for batch in plan[start:end] for i in batch) == list(range(len(lengths)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=25), min_size=1, max_size=4), st.integers(2, 90))
def test_an_epoch_has_the_rows_it_is_given_as_often_as_they_are_given(epochs: list[list[int]], budget: int) -> None:
    lengths = [3 + 4 * i for i in range(10)]
    plan = plan_batches(lengths, budget, len(epochs), 0, lambda epoch: epochs[epoch])
    ends = epoch_ends(plan, list(map(len, epochs)))
    assert ends[-1] == len(plan)
    for rows, start, end in zip(epochs, [0, *ends], ends, strict=False):
        assert sorted(i for batch in plan[start:end] for i in batch) == sorted(rows)
    for batch in plan:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_epochs_and_seeds_differ_and_little_is_padding() -> None:
    lengths = [5 + (37 * i) % 60 for i in range(400)]
    plan = plan_batches(lengths, 512, epochs=2, seed=0)
    end, _ = epoch_ends(plan, [400, 400])
    first, second = plan[:end], plan[end:]
    assert first != second
    assert first != plan_batches(lengths, 512, epochs=1, seed=1)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in first)
    assert padded < 1.1 * sum(lengths)
    longest = [max(lengths[i] for i in batch) for batch in first]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_collation_puts_labels_where_they_are_predicted_and_targets_in_label_order() -> None:
    long = row_of([5, 6, 7, 8], [1, 2], [{7: 0.6, 1: 0.2}, {8: 0.9}], [0.2, 0.1])
    short = row_of([3, 4], [0], [{4: 1.02}], [0.02])  # what rounding stores does not sum to 1
    batch = collate([long, short], with_targets=True)
    assert batch["ids_BT"].tolist() == [[5, 6, 7, 8], [3, 4, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 7, 8, IGNORED], [4, IGNORED, IGNORED, IGNORED]]
    assert batch["weight_N"].tolist() == [1.0, 1.0, 1.0]
    assert batch["support_ids_NK"].tolist() == [[7, 1], [8, 0], [4, 0]]
    probabilities = batch["support_logprobs_NK"].exp()
    np.testing.assert_allclose(probabilities, [[0.6, 0.2], [0.9, 0.0], [1.02 / 1.04, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(batch["tail_logprob_N"].exp(), [0.2, 0.1, 0.02 / 1.04], rtol=1e-6)


def test_a_position_counts_its_own_weight_times_its_rows() -> None:
    long = row_of([5, 6, 7, 8], [1, 2], [{7: 0.6}, {8: 0.9}], [0.4, 0.1])
    short = row_of([3, 4], [0], [{4: 0.5}], [0.5])
    weighted = replace(long, weight=2.0, position_weights=np.array([0.5, 3.0], np.float32))
    assert collate([weighted, short], with_targets=False)["weight_N"].tolist() == [1.0, 6.0, 1.0]


def test_packed_rows_stand_one_after_another_and_their_positions_begin_anew() -> None:
    long = row_of([5, 6, 7, 8], [1, 2], [{7: 0.6, 1: 0.2}, {8: 0.9}], [0.2, 0.1])
    short = row_of([3, 4], [0], [{4: 0.9}], [0.1])
    padded, packed = (collate([short, long, short], with_targets=True, packed=p) for p in (False, True))
    assert packed["ids_BT"].tolist() == [[3, 4, 5, 6, 7, 8, 3, 4]]
    assert packed["positions_BT"].tolist() == [[0, 1, 0, 1, 2, 3, 0, 1]]
    assert packed["labels"].tolist() == [[4, IGNORED, IGNORED, 7, 8, IGNORED, 4, IGNORED]]
    assert packed.keys() - padded.keys() == {"positions_BT"}
    assert all(torch.equal(packed[name], padded[name]) for name in padded.keys() - {"ids_BT", "labels"})


def test_the_control_sees_the_same_rows_without_targets() -> None:
    row = row_of([5, 6, 7], [0, 1], [{6: 0.9}, {7: 0.9}], [0.1, 0.1])
    student, control = collate([row], with_targets=True), collate([row], with_targets=False)
    assert sorted(control) == ["ids_BT", "labels", "weight_N"]
    assert all(torch.equal(student[name], control[name]) for name in control)


def test_no_rows_collate_to_padding_that_trains_nothing() -> None:
    for packed in (False, True):
        batch = collate([], with_targets=True, packed=packed)
        assert batch["ids_BT"].tolist() == [[0]] and batch["labels"].tolist() == [[IGNORED]]
        assert batch["weight_N"].shape == (0,) and batch["support_ids_NK"].shape == (0, 1)


def test_weights_take_the_place_of_the_tail_and_samples_stand_beside_it() -> None:
    long = row_of([5, 6, 7, 8], [1, 2], [{7: 0.6, 1: 0.2}, {8: 0.9}], [0.2, 0.1])
    short = row_of([3, 4], [0], [{4: 1.0}], [0.0])

    def with_targets(row: CapturedRow, **columns: np.ndarray) -> CapturedRow:
        return replace(row, targets=replace(row.targets, **columns))

    weighted = [
        with_targets(long, weights_N=np.array([0.5, 0.4, 0.3], np.float32)),
        with_targets(short, weights_N=np.array([0.8], np.float32)),
    ]
    batch = collate(weighted, with_targets=True)
    assert "tail_logprob_N" not in batch and "support_logprobs_NK" not in batch
    np.testing.assert_allclose(batch["support_weights_NK"], [[0.5, 0.4], [0.3, 0.0], [0.8, 0.0]], rtol=1e-6)
    sampled = [
        with_targets(long, tail_sample_ids_PS=np.array([[3, 3], [2, 9]], np.int32)),
        with_targets(short, tail_sample_ids_PS=np.zeros((1, 0), np.int32)),
    ]
    batch = collate(sampled, with_targets=True)
    assert batch["tail_sample_ids_NS"].tolist() == [[3, 3], [2, 9], [-1, -1]]
    np.testing.assert_allclose(batch["tail_logprob_N"].exp(), [0.2, 0.1, 0.0], rtol=1e-6)
    imported = [sampled[0], short]  # by another engine, which drew none
    assert collate(imported, with_targets=True)["tail_sample_ids_NS"].tolist() == [[3, 3], [2, 9], [-1, -1]]
