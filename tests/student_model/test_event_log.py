"""What TensorBoard shows of a training is its curve, whole, while it runs and after it was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.progress import Progress, ignore_progress
from distill_assets.student_model.identity import StudentKind
from distill_assets.student_model.saving import StudentReport
from distill_assets.student_model.training import train_student
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from tests.student_model.events import scalars
from tests.student_model.test_training import fresh, spec_of

Train = Callable[..., StudentReport]


@pytest.fixture
def train(teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path) -> Train:
    def train(
        kind: StudentKind = "student", on_progress: Callable[[Progress], None] = ignore_progress, epochs: int = 2
    ) -> StudentReport:
        return train_student(
            spec_of(kind, epochs=epochs), fresh(teacher), tokenizer, rows, tmp_path / "x", validation=rows[:3],
            device="cpu", under_way=tmp_path / "under_way", checkpoint_seconds=0.0, events=tmp_path / "events",
            on_progress=on_progress,
        )  # fmt: skip

    return train


@pytest.mark.parametrize("kind", ["student", "control"])
def test_every_step_and_every_look_is_there(train: Train, tmp_path: Path, kind: StudentKind) -> None:
    report, shown = train(kind), scalars(tmp_path / "events")
    names = ["ce", *(["kd"] if kind == "student" else [])]
    for name in ("loss", "learning_rate", *names):
        assert_shown(shown[f"train/{name}"], [(p.step, getattr(p, name)) for p in report.curve])
    for name in names:
        assert_shown(shown[f"validation/{name}"], [(p.step, getattr(p, name)) for p in report.validation])
    assert ("train/kd" in shown, "validation/kd" in shown) == (kind == "student",) * 2
    speeds = shown["train/tokens_per_second"]
    assert [step for step, _ in speeds] == list(range(1, report.steps + 1)) and min(s for _, s in speeds) > 0


def assert_shown(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected])


def test_events_can_be_read_while_it_runs_and_go_on_where_an_interrupted_training_does(
    train: Train, tmp_path: Path
) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 4:  # after checkpoint 3, before anything is written of step 4
            assert [step for step, _ in scalars(tmp_path / "events")["train/loss"]] == [1, 2, 3]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(on_progress=interrupt)
    steps = train().steps
    assert len(list((tmp_path / "events").iterdir())) == 2
    assert [step for step, _ in scalars(tmp_path / "events")["train/loss"]] == list(range(1, steps + 1))


def test_a_training_that_starts_over_shows_nothing_of_the_one_before(train: Train, tmp_path: Path) -> None:
    train(epochs=3)
    report = train(epochs=1)
    assert [step for step, _ in scalars(tmp_path / "events")["train/loss"]] == list(range(1, report.steps + 1))
    assert len(list((tmp_path / "events").iterdir())) == 1


def test_events_that_cannot_be_written_are_no_reason_to_stop(train: Train, tmp_path: Path) -> None:
    (tmp_path / "events").symlink_to(tmp_path / "nowhere" / "else")
    (tmp_path / "nowhere").write_text("a file in the way")
    notes: list[str] = []
    assert train(on_progress=lambda progress: notes.append(progress.note)).steps == len(notes)
    assert all(", no TensorBoard events: " in note for note in notes)
