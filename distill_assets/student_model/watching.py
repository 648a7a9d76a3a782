"""Looks at a training while it runs: progress after every step, the validation rows now and then, early stopping."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distill_assets.foundation.progress import Progress, ProgressListener
from distill_assets.student_model.batches import collate, plan_batches
from distill_assets.student_model.early_stopping import best_look, is_over
from distill_assets.student_model.module import mean_losses
from distill_assets.student_model.processes import told_by_first
from distill_assets.student_model.saving import StudentSpec, ValidationPoint
from distill_assets.student_model.weights import copied, trained_weights
from distill_assets.teacher_capture.sparse_targets import CapturedRow

if TYPE_CHECKING:
    from distill_assets.student_model.training import DistillationTrainer


class Watch(TrainerCallback):
    """Reports every step. Looks at the validation rows after each epoch, or every so many steps and at the end; with
    early stopping keeps the weights of the best look, and stops when there was none better for long enough.
    """

    def __init__(
        self,
        trainer: DistillationTrainer,
        spec: StudentSpec,
        validation: Sequence[CapturedRow],
        on_progress: ProgressListener,
    ) -> None:
        self._trainer, self._spec, self._validation = trainer, spec, validation
        self._plan = plan_batches([len(row.input_ids) for row in validation], spec.training.batch_tokens, 1, seed=0)
        self._on_progress = on_progress
        self._tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tokens = sum(point.tokens for point in self._trainer.curve)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step, total = state.global_step, state.max_steps
        point = self._trainer.curve[-1]
        self._tokens += point.tokens
        if self._validation and self._is_time(step, total):
            self._look(step)
        notes = [f"loss {point.loss:.4f}"]
        if self._trainer.validation:
            notes.append(f"validation {self._spec.judged_by} {self._trainer.validation[-1].loss:.4f}")
        notes.append(f"{self._tokens / self._trainer.seconds:,.0f} supervised tokens/s")
        patience = self._spec.training.early_stopping
        if patience is not None and is_over(self._losses, patience) and step < total:
            control.should_training_stop, total = True, step
            notes.append(f"stopped: {patience} look{'s' if patience > 1 else ''} without a better one")
        notes += filter(None, [self._trainer.passes.note, *self._trainer.troubles.values()])
        self._on_progress(
            Progress(f"train {self._spec.kind}", step, total, "steps", self._trainer.seconds, ", ".join(notes))
        )

    def _is_time(self, step: int, total: int) -> bool:
        every = self._spec.training.validate_every
        return step in self._trainer.ends if every is None else step % every == 0 or step == total

    @property
    def _losses(self) -> list[float]:
        return [point.loss for point in self._trainer.validation]

    def _look(self, step: int) -> None:
        trainer = self._trainer
        passes = trainer.passes
        parts = (part for batch in self._plan for part in passes.of([self._validation[i] for i in batch]))
        batches = (collate(part, trainer.with_targets, passes.packed) for part in parts)
        kd, ce = told_by_first(mean_losses(trainer.module, batches))
        epoch = bisect_left(trainer.ends, step) + 1
        trainer.validation.append(ValidationPoint(epoch, step, kd if trainer.with_targets else None, ce))
        if self._spec.training.early_stopping is not None and best_look(self._losses) == len(trainer.validation) - 1:
            trainer.best = copied(trained_weights(trainer.module))
