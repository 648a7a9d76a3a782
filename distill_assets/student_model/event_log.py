"""A training's curve as TensorBoard reads it, while it runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distill_assets.foundation.errors import first_line
from distill_assets.foundation.files import remove

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from distill_assets.student_model.training import DistillationTrainer

FLUSH_SECONDS = 5


class EventLog(TrainerCallback):
    """Writes each step's losses, rate and speed, and each look at the validation rows, to `folder`.

    One that goes on from a checkpoint goes on in the same folder, and hides what was written after that
    checkpoint; one that starts over removes what was there. That events cannot be written is no reason to stop.
    It comes after whoever decides on a checkpoint: what a checkpoint knows must be in the files before it.
    """

    def __init__(self, trainer: DistillationTrainer, folder: Path) -> None:
        self._trainer, self._folder = trainer, folder
        self._writer: SummaryWriter | None = None
        self._looks, self._last = 0, time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._looks, self._last = len(self._trainer.validation), time.perf_counter()
        try:
            if not state.global_step and self._folder.exists():
                remove(self._folder)
            self._wait_for_a_later_name()
            self._writer = SummaryWriter(str(self._folder), purge_step=state.global_step + 1, flush_secs=FLUSH_SECONDS)
        except OSError as error:
            self._give_up(error)

    def _wait_for_a_later_name(self) -> None:
        """TensorBoard reads files in the order of their names, which hold the second they were begun in."""
        while any(f".{int(time.time()):010d}." in file.name for file in self._folder.glob("events.*")):
            time.sleep(0.05)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        point, now = self._trainer.curve[-1], time.perf_counter()
        seconds, self._last = now - self._last, now
        looks, self._looks = self._trainer.validation[self._looks :], len(self._trainer.validation)
        try:
            self._write("train", point.step, loss=point.loss, kd=point.kd, ce=point.ce)
            self._write(
                "train", point.step, learning_rate=point.learning_rate, tokens_per_second=point.tokens / seconds
            )
            for look in looks:
                self._write("validation", look.step, kd=look.kd, ce=look.ce)
            if self._writer and control.should_save:
                self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write what is not written yet."""
        writer, self._writer = self._writer, None
        try:
            if writer:
                writer.close()
        except OSError as error:
            self._give_up(error)

    def _write(self, group: str, step: int, **values: float | None) -> None:
        for name, value in values.items():
            if self._writer and value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        self._trainer.troubles["events"] = f"no TensorBoard events: {first_line(error)}"
