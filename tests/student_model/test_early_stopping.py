"""When training stops, and that what is saved is what the validation rows liked best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from distill_assets.foundation.errors import TrainingError
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.progress import Progress
from distill_assets.student_model.batches import collate
from distill_assets.student_model.early_stopping import best_look, is_over
from distill_assets.student_model.identity import StudentKind
from distill_assets.student_model.losses import LossMixture
from distill_assets.student_model.module import DistillationModule, mean_losses
from distill_assets.student_model.saving import StudentReport, ValidationPoint, read_student
from distill_assets.student_model.training import train_student
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from tests.student_model.rows import own_rows
from tests.student_model.test_training import fresh, spec_of, weights

NAN = math.nan


@pytest.mark.parametrize(
    ("losses", "best", "over"),
    [
        ([], None, False),
        ([2.0], 0, False),
        ([2.0, 1.0, 1.5], 1, False),
        ([2.0, 1.0, 1.5, 1.0], 1, True),  # no better is no better
        ([2.0, 1.0, 1.5, 0.9], 3, False),
        ([2.0, NAN, NAN], 0, True),
        ([NAN], None, False),
        ([NAN, NAN], None, True),
        ([NAN, 3.0], 1, False),
    ],
)
def test_the_first_lowest_is_the_best_and_two_without_a_better_one_are_the_end(
    losses: list[float], best: int | None, over: bool
) -> None:
    assert best_look(losses) == best
    assert is_over(losses, patience=2) == over


def trained(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: Sequence[CapturedRow],
    validation: Sequence[CapturedRow], folder: Path, kind: StudentKind = "student", seen: list[Progress] | None = None,
    **training: Any,
) -> StudentReport:  # fmt: skip
    return train_student(
        spec_of(kind, epochs=3, **training), fresh(teacher), tokenizer, rows, folder, validation=validation,
        device="cpu", on_progress=(seen if seen is not None else []).append,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["student", "control"])
def test_it_stops_when_validation_gets_worse_and_saves_the_best_weights(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path, kind: StudentKind
) -> None:
    other = own_rows(fresh(teacher), 3)
    seen: list[Progress] = []
    report = trained(
        teacher, tokenizer, rows, other, tmp_path / "x", kind, seen, learning_rate=0.02, validate_every=2,
        early_stopping=2,
    )  # fmt: skip
    stopping, looks = report.stopping, report.validation
    assert stopping is not None
    assert [look.step for look in looks] == list(range(2, report.steps + 1, 2))
    assert report.steps == stopping.made_steps == len(report.curve) < stopping.planned_steps
    losses = [look.kd if kind == "student" else look.ce for look in looks]
    assert len(losses) - 1 - best_look(losses) == 2 and None not in losses
    assert (stopping.kept_step, stopping.kept_loss) == min(
        ((look.step, look.loss) for look in looks), key=lambda pair: pair[1]
    )
    assert (seen[-1].done, seen[-1].total) == (report.steps, report.steps)
    assert seen[-1].note.endswith("stopped: 2 looks without a better one")
    assert f"validation {'KL' if kind == 'student' else 'cross-entropy'} {losses[-1]:.4f}" in seen[-1].note
    assert read_student(tmp_path / "x").report == report
    words = f"stopped early, after {report.steps} of {stopping.planned_steps} steps; kept are the weights after step"
    assert f"Early stopping: {words} {stopping.kept_step}, " in (tmp_path / "x" / "README.md").read_text()

    saved = DistillationModule(
        AutoModelForCausalLM.from_pretrained(tmp_path / "x"), StudentVocabulary(320), LossMixture(kd_weight=0.9)
    )
    measured = mean_losses(saved, [collate(other, kind == "student")])[0 if kind == "student" else 1]
    assert measured == pytest.approx(stopping.kept_loss, rel=1e-5)


def test_without_a_worse_look_it_goes_on_to_the_end_to_the_same_bits_as_without_early_stopping(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    watched = trained(teacher, tokenizer, rows, rows, tmp_path / "a", early_stopping=2)
    plain = trained(teacher, tokenizer, rows, rows, tmp_path / "b", validate_every=5)
    assert (
        watched.stopping and watched.stopping.kept_step == watched.stopping.made_steps == watched.steps == plain.steps
    )
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert "Early stopping: not stopped early, after all of" in (tmp_path / "a" / "README.md").read_text()
    assert [look.epoch for look in watched.validation] == [1, 2, 3]
    ends = [look.step for look in watched.validation]
    assert [look.step for look in plain.validation] == [*range(5, plain.steps, 5), plain.steps]
    for look in plain.validation:  # of the epoch the step is in
        assert look.epoch == next(epoch for epoch, end in enumerate(ends, start=1) if look.step <= end)
    assert plain.stopping is None and "Early stopping" not in (tmp_path / "b" / "README.md").read_text()


def test_it_needs_validation_rows(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    with pytest.raises(
        TrainingError, match=r"early_stopping needs validation rows; add a shard that matches data\.val"
    ):
        trained(teacher, tokenizer, rows, [], tmp_path / "x", early_stopping=2)


def test_a_look_is_judged_by_what_is_distilled_and_of_a_control_by_the_tokens() -> None:
    assert ValidationPoint(1, 4, 0.5, 2.0).loss == 0.5
    assert ValidationPoint(1, 4, None, 2.0).loss == 2.0
    names = {"forward_kl": "KL", "reverse_kl": "reverse KL", "jsd": "JSD", "renormalized": "loss"}
    assert {name: spec_of(objective=name).judged_by for name in names} == names
    assert replace(spec_of(), targets={"kind": "sampled"}).judged_by == spec_of(temperature=2.0).judged_by == "loss"
    assert spec_of("control").judged_by == "cross-entropy"
