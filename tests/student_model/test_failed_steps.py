"""A loss that is no number: it stops, says whose doing it is, and what was good stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from distill_assets.foundation.errors import TrainingError
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.progress import Progress
from distill_assets.student_model.saving import StudentReport
from distill_assets.student_model.training import train_student
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from tests.student_model.test_training import fresh, spec_of, weights

Train = Callable[..., StudentReport]


@pytest.fixture
def train(teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Train:
    def train(
        rows: list[CapturedRow], name: str = "x", seen: list[int] | None = None, **training: Any
    ) -> StudentReport:
        def listen(progress: Progress) -> None:
            if seen is not None:
                seen.append(progress.done)

        return train_student(
            spec_of(**training), fresh(teacher), tokenizer, rows, tmp_path / name, device="cpu",
            under_way=tmp_path / "under_way", checkpoint_seconds=0.0, on_progress=listen,
        )  # fmt: skip

    return train


def weighing(row: CapturedRow, weight: float) -> CapturedRow:
    """`row` with a weight that no shard may give it: what a damaged memory or file might do."""
    return replace(row, weight=weight)


def test_the_rows_at_fault_are_named_and_the_same_training_goes_on_from_before_them(
    train: Train, rows: list[CapturedRow], tmp_path: Path
) -> None:
    whole, seen = train(rows, "whole"), list[int]()
    order = sorted(rows, key=lambda row: row.key)
    said = ""
    for bad in order:  # one that is not in the first batch
        seen.clear()
        with pytest.raises(TrainingError) as stopped:
            train([weighing(row, float("inf")) if row is bad else row for row in rows], seen=seen)
        said = str(stopped.value)
        if seen:
            break
    step = len(seen) + 1
    assert said.startswith(
        f"the loss of step {step} is inf: the other rows of its batch have one, but not key {bad.key}; mend these"
    )
    assert said.splitlines()[1] == f"the checkpoint of step {step - 1} is kept; the same training goes on from there"
    assert not (tmp_path / "x").exists()

    seen.clear()
    assert train(rows, seen=seen).curve == whole.curve
    assert seen[0] == step and weights(tmp_path / "x") == weights(tmp_path / "whole")
    assert not (tmp_path / "under_way").exists()


def test_weights_that_are_no_numbers_are_the_doing_of_the_step_before_and_make_no_checkpoint(
    train: Train, rows: list[CapturedRow], tmp_path: Path
) -> None:
    seen: list[int] = []
    with pytest.raises(TrainingError) as stopped:
        train(rows, seen=seen, learning_rate=1e30)  # far off after a step, beyond all numbers after the next
    assert seen == [1, 2]
    said = str(stopped.value)
    assert said.startswith("the loss of step 3 is nan: the step before it left weights that are not finite (key")
    assert "; lower training.learning_rate" in said and "the checkpoint of step 1 is kept" in said
    assert 0 < sum(row.key in said for row in rows) < len(rows)
    assert [path.name for path in tmp_path.rglob("checkpoint-*")] == ["checkpoint-1"]


def test_a_loss_that_no_row_has_is_said_of_all_of_its_batch(train: Train, rows: list[CapturedRow]) -> None:
    with pytest.raises(TrainingError, match=r"step 1 is (nan|inf): no row of its batch has one \(keys? ") as stopped:
        train([weighing(row, float("inf")) for row in rows])
    assert "; lower training.learning_rate" in str(stopped.value)


def test_losses_that_are_too_large_together_are_told_apart(train: Train, rows: list[CapturedRow]) -> None:
    with pytest.raises(TrainingError, match=r"each row of its batch has one alone \(keys .*so their sum is too large"):
        train([weighing(row, 5e35) for row in rows], batch_tokens=4096)
