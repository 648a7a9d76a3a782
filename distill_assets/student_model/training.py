"""Train one student, or its control, on captured rows: transformers' Trainer over planned batches.

What is ours: batches planned from the rows alone, the loss inside the module, a learning-rate
schedule without an idle step, a curve of every step, and a stop at the first loss that is not
finite. What is Trainer's: devices, processes, clipping, AdamW, the states of a checkpoint.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from distill_assets.foundation.devices import free_memory, is_out_of_memory, resolve_device
from distill_assets.foundation.errors import TrainingError, first_line
from distill_assets.foundation.files import remove, write_json
from distill_assets.foundation.language_model import head_width
from distill_assets.foundation.progress import ProgressListener, ignore_progress
from distill_assets.foundation.settings import TrainingSettings
from distill_assets.student_model.batches import collate, epoch_ends, plan_batches
from distill_assets.student_model.checkpoints import CHECKPOINT_SECONDS, latest_checkpoint, mark_whole
from distill_assets.student_model.choice import Turns
from distill_assets.student_model.early_stopping import best_look
from distill_assets.student_model.event_log import EventLog
from distill_assets.student_model.failed_steps import why_not_finite
from distill_assets.student_model.lora import Adapters
from distill_assets.student_model.losses import LossMixture
from distill_assets.student_model.module import DistillationModule
from distill_assets.student_model.passes import Passes, prefers_packed_rows, random_state, room_for_student
from distill_assets.student_model.processes import told_by_first
from distill_assets.student_model.saving import (
    CurvePoint,
    Stopping,
    StudentReport,
    StudentSpec,
    ValidationPoint,
    save_student,
)
from distill_assets.student_model.vocabulary import FitReport, fit_rows
from distill_assets.student_model.watching import Watch
from distill_assets.student_model.weights import are_finite, put_back, trained_weights
from distill_assets.teacher_capture.sparse_targets import CapturedRow

_WEIGHTS, _BEST, _CURVE = "model.safetensors", "best.safetensors", "curve.json"  # of a checkpoint


def train_student(
    spec: StudentSpec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[CapturedRow],
    folder: Path,
    *,
    validation: Sequence[CapturedRow] = (),
    max_missing_mass: float = 1.0,
    device: str = "auto",
    pass_tokens: int | None = None,
    gradient_checkpointing: bool = False,
    under_way: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    events: Path | None = None,
    on_progress: ProgressListener = ignore_progress,
) -> StudentReport:
    """Train `model` (an `initial_student`, changed in place) and write it to `folder` with `tokenizer`.

    `rows` and `validation` carry targets as stored. Their order does not matter: rows are planned
    in the order of their keys, so equal ids mean equal students, on one CPU and with passes of one size bit for bit.
    Raises TrainingError when no row can be trained on, when more than `max_missing_mass` of the teacher's
    probability lies on ids the student lacks, when a loss is not finite, or when there is too little memory; whatever
    is raised, an interrupt included, `folder` is as it was.

    `pass_tokens` and `gradient_checkpointing` say how a step is run, see `Passes`; where memory runs out they change.

    With a folder `under_way`, which is one training's at a time, a checkpoint is left there every `checkpoint_seconds`,
    and one that was killed goes on from it, on one CPU to the same bits as undisturbed; the folder is removed once the
    student is saved. In one of several processes that accelerate launched, it trains with the others, and the first
    saves. What TensorBoard shows is written to a folder `events`.
    """
    target = resolve_device(device)
    if head_width(model) < spec.vocabulary.n_real:
        raise TrainingError(
            f"student {spec.student_id}: its head has {head_width(model)} rows, but {spec.vocabulary.n_real} ids are "
            "to be learnt; give its configuration a vocab_size at least that large"
        )
    train_rows, fit = _usable(rows, spec, model)
    if fit.mass_dropped > max_missing_mass:
        raise TrainingError(
            f"student {spec.student_id}: {fit.mass_dropped:.2%} of the teacher's probability lies on ids the student "
            f"lacks; tokenizer.max_missing_mass allows {max_missing_mass:.2%}: raise it, or use another student"
        )
    validation_rows, _ = _usable(validation, spec, model) if validation else ([], None)
    if spec.training.early_stopping is not None and not validation_rows:
        raise TrainingError(
            f"student {spec.student_id}: training.early_stopping needs validation rows; add a shard that matches "
            "data.validation, or remove it"
        )
    if spec.training.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    adapters = Adapters(model, spec.training.lora, spec.training.seed) if spec.training.lora else None
    with_targets = spec.kind == "student"
    chosen = spec.training
    mixture = LossMixture(chosen.objective, chosen.temperature, chosen.kd_weight, chosen.tail_sample_weight)
    module = DistillationModule(model, spec.vocabulary, mixture, chosen.precision)
    turns = Turns(train_rows, spec.training.seed)
    passes = Passes(model, pass_tokens, prefers_packed_rows(model, chosen.precision), gradient_checkpointing)
    plan = plan_batches(
        [len(row.input_ids) for row in train_rows],
        spec.training.batch_tokens,
        spec.training.epochs,
        spec.training.seed,
        turns.of,
    )
    sizes = [len(turns.of(epoch)) for epoch in range(spec.training.epochs)]
    with _folder_for(under_way) as checkpoints, ExitStack() as stack:
        arguments = training_arguments(spec.training, len(plan), target, checkpoints)
        trainer = DistillationTrainer(module, arguments, train_rows, plan, sizes, with_targets, passes)
        trainer.add_callback(Watch(trainer, spec, validation_rows, on_progress))
        before = None
        if under_way is not None:
            trainer.add_callback(_Checkpoints(checkpoint_seconds))
            before = told_by_first(latest_checkpoint(checkpoints) if trainer.is_world_process_zero() else None)
        if events is not None and trainer.is_world_process_zero():
            trainer.add_callback(stack.enter_context(closing(EventLog(trainer, events))))
        with room_for_student(target, model):
            trainer.train(resume_from_checkpoint=str(before) if before else None)
    stopping = _keep_the_best(trainer, spec, len(plan)) if spec.training.early_stopping is not None else None
    if not are_finite(module):
        raise TrainingError(
            f"student {spec.student_id}: the last step left weights that are not finite; lower training.learning_rate"
        )
    report = StudentReport(
        rows=len(train_rows),
        validation_rows=len(validation_rows),
        steps=len(trainer.curve),
        supervised_tokens=sum(point.tokens for point in trainer.curve),
        seconds=trainer.seconds,
        device=str(target),
        fit=fit,
        curve=tuple(trainer.curve),
        validation=tuple(trainer.validation),
        stopping=stopping,
    )
    if trainer.is_world_process_zero():
        if adapters:
            adapters.merge()
        save_student(folder, model, tokenizer, spec, report, adapters)
        if under_way is not None:
            remove(under_way)
    return report


def _keep_the_best(trainer: DistillationTrainer, spec: StudentSpec, planned: int) -> Stopping:
    """Give the module the weights of its best look."""
    if (best := best_look([point.loss for point in trainer.validation])) is None:
        raise TrainingError(f"student {spec.student_id}: no validation loss is a number; lower training.learning_rate")
    put_back(trainer.module, trainer.best)
    kept = trainer.validation[best]
    return Stopping(planned, len(trainer.curve), kept.step, kept.loss, spec.judged_by)


@contextmanager
def _folder_for(under_way: Path | None) -> Iterator[Path]:
    """Where checkpoints go: kept for the next process, or for this block only."""
    if under_way is not None:
        under_way.mkdir(parents=True, exist_ok=True)
        yield under_way
        return
    with tempfile.TemporaryDirectory(prefix="distill-") as scratch:
        yield Path(scratch)


def _usable(
    rows: Sequence[CapturedRow], spec: StudentSpec, model: PreTrainedModel
) -> tuple[list[CapturedRow], FitReport]:
    ordered = sorted(rows, key=lambda row: (row.key, row.weight, row.passes, row.weighting))
    embeddings: Any = model.get_input_embeddings()
    fitted, fit = fit_rows(ordered, spec.vocabulary, len(embeddings.weight))
    if not fitted:
        reason = "no captured rows were given" if not rows else "no row has a target token that the student knows"
        raise TrainingError(f"student {spec.student_id}: {reason}; look at the training and validation shards")
    return fitted, fit


def learning_rate_share(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate in step `step` (from 0): linear up, then half a cosine.

    Neither the first step nor the last has the share 0: a step that learns nothing is a batch lost.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def training_arguments(
    training: TrainingSettings, steps: int, device: torch.device, scratch: Path
) -> TrainingArguments:
    """Trainer's arguments for `steps` optimiser steps on exactly `device`."""
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        optim="adamw_torch",
        learning_rate=training.learning_rate,
        warmup_steps=math.ceil(training.warmup_ratio * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        use_cpu=device.type == "cpu",
        logging_strategy="no",
        save_strategy="no",  # when, `_Checkpoints` says
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if device.type == "cuda" and arguments.world_size == 1:
        # Left to itself, Trainer takes cuda:0 and wraps the module in DataParallel over every GPU it sees.
        chosen = torch.device("cuda", device.index or 0)
        vars(arguments)["_setup_devices"] = chosen
        arguments._n_gpu = 1
        torch.cuda.set_device(chosen)
    return arguments


class _Steps(Dataset[dict[str, Any]]):
    """Item i is planned batch i: this process's share of its rows, and of all of them the keys and how many positions
    they train.
    """

    def __init__(self, rows: Sequence[CapturedRow], plan: Sequence[Sequence[int]], rank: int, processes: int) -> None:
        self._rows, self._plan = rows, plan
        self._rank, self._processes = rank, processes

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, step: int) -> dict[str, Any]:
        rows = [self._rows[i] for i in self._plan[step]]
        share = rows[self._rank :: self._processes]
        positions = sum(row.targets.n_positions for row in rows)
        return {"rows": share, "keys": [row.key for row in rows], "positions": positions}


class DistillationTrainer(Trainer):
    """Trainer that takes planned batches in order, one an optimiser step, and keeps the curve. `sizes`: rows of each
    epoch.
    """

    def __init__(
        self,
        module: DistillationModule,
        arguments: TrainingArguments,
        rows: Sequence[CapturedRow],
        plan: Sequence[Sequence[int]],
        sizes: Sequence[int],
        with_targets: bool,
        passes: Passes,
    ) -> None:
        steps = _Steps(rows, plan, arguments.process_index, arguments.world_size)
        super().__init__(model=module, args=arguments, train_dataset=steps)
        self.remove_callback(PrinterCallback)
        self.module = module
        self.ends = epoch_ends(plan, sizes)
        self.with_targets = with_targets
        self.passes = passes
        self.curve: list[CurvePoint] = []
        self.validation: list[ValidationPoint] = []
        self.best: dict[str, Tensor] = {}  # trained weights of the best look at the validation rows, if one is kept
        self.troubles: dict[str, str] = {}  # that are no reason to stop, by what has them
        self._rows = rows
        self._keys: dict[int, list[str]] = {}  # of the rows of this step and the one before
        self._seconds_before, self._started = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of training so far, those of the processes before included."""
        return self._seconds_before + time.perf_counter() - self._started

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """One item a step; the shares of several processes are cut in `_Steps`, not by accelerate."""
        assert isinstance(self.train_dataset, Dataset)
        # As batches of one: what a resumed training skips is skipped by the batch.
        return DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=_the_item)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A checkpoint's weights, those that are trained, and the curve: Trainer's own way knows neither."""
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_weights(self.module), folder / _WEIGHTS)
        if self.best:
            save_file(self.best, folder / _BEST)
        told = {"curve": list(map(asdict, self.curve)), "validation": list(map(asdict, self.validation))}
        write_json(folder / _CURVE, {**told, "seconds": self.seconds, "pass_tokens": self.passes.tokens})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's, marked whole at its end, when every process has written its part. That one cannot be written
        is no reason to stop. None of weights that are not finite: the one before it is worth going on from.
        """
        if not are_finite(self.module):
            return
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        trouble = ""
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            trouble = first_line(error)
        trouble = next(filter(None, gather_object([trouble])), "")
        if self.is_world_process_zero():
            try:
                if not trouble:
                    mark_whole(folder)
            except OSError as error:
                trouble = first_line(error)
            if trouble:
                remove(folder)
        self.troubles["checkpoint"] = trouble and f"no checkpoint: {trouble}"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        put_back(self.module, load_file(folder / _WEIGHTS))
        self.best = load_file(folder / _BEST) if (folder / _BEST).exists() else {}
        told = json.loads((folder / _CURVE).read_text(encoding="utf-8"))
        self.curve = [CurvePoint(**point) for point in told["curve"]]
        self.validation = [ValidationPoint(**point) for point in told["validation"]]
        self._seconds_before = told["seconds"]
        self.passes.tokens = min(self.passes.tokens, told["pass_tokens"])  # what memory had room for

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate_share(step, num_training_steps, warmup_steps),
        )
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward passes of a planned batch. Where memory runs out, all of them again, but smaller."""
        model.train()
        while True:
            restart = random_state(self.args.device)
            total = torch.zeros(3, device=self.args.device)
            passes = self.passes.of(inputs["rows"])
            try:
                for rows in passes:
                    last = rows is passes[-1]
                    with nullcontext() if last else self.accelerator.no_sync(model):
                        total += self._forward_and_backward(model, rows, inputs["positions"])
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the except block: the error's traceback holds on to every tensor of the pass.
            model.zero_grad()
            free_memory()
            restart()
            if self.args.world_size > 1:
                raise TrainingError(
                    f"process {self.args.process_index} on {self.args.device} has no memory left for a pass of "
                    f"{self.passes.tokens:,} tokens, and no process can go on alone\n"
                    f"set pass_tokens of the run configuration to {self.passes.tokens // 2}, or train in one process"
                )
            self.passes.take_less(rows)
        loss, kd, ce = self.accelerator.reduce(total, reduction="sum").tolist()
        self._note(loss, kd, ce, inputs)
        return total[0]

    def _forward_and_backward(self, model: Any, rows: Sequence[CapturedRow], positions: int) -> Tensor:
        """Gradients of a pass, added to those that are there; its share of the step's [loss, kd, ce]."""
        batch = self._prepare_inputs(collate(rows, self.with_targets, self.passes.packed))
        outputs: dict[str, Tensor] = model(**batch, num_items_in_batch=positions)
        # DDP averages gradients; shares must add up.
        self.accelerator.backward(outputs["loss"] * self.accelerator.num_processes)
        return torch.stack([outputs["loss"].detach(), outputs["kd"], outputs["ce"]])

    def _note(self, loss: float, kd: float, ce: float, inputs: dict[str, Any]) -> None:
        """Add a point to the curve; TrainingError where the loss is no number."""
        step = self.state.global_step + 1
        self._keys = {step - 1: self._keys.get(step - 1, []), step: inputs["keys"]}
        if not math.isfinite(loss):
            self._stop(step, loss)
        known = kd if self.with_targets else None
        self.curve.append(CurvePoint(step, loss, known, ce, inputs["positions"], float(self._get_learning_rate())))

    def _stop(self, step: int, loss: float) -> NoReturn:
        """TrainingError that says why, and what a training that is started again goes on from."""
        rows = [row for row in self._rows if row.key in self._keys[step]]
        said = f"the loss of step {step} is {loss}: " + why_not_finite(
            self.module, rows, self._keys[step - 1], self.with_targets
        )
        first = self.is_world_process_zero()
        if kept := told_by_first(latest_checkpoint(Path(str(self.args.output_dir))) if first else None):
            said += (
                f"\nthe checkpoint of step {kept.name.partition('-')[2]} is kept; the same training goes on from there"
            )
        raise TrainingError(said)


def _the_item(items: list[dict[str, Any]]) -> dict[str, Any]:
    [item] = items
    return item


class _Checkpoints(TrainerCallback):
    """Asks for a checkpoint every so many seconds: how long a step takes, nobody knows beforehand.

    A clock for all processes, the first one's, since all write their part.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_due = told_by_first(time.monotonic() - self._last >= self._seconds)
        if is_due and state.global_step < state.max_steps and not control.should_training_stop:
            control.should_save, self._last = True, time.monotonic()
