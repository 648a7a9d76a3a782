"""A student on disk: `students/<student_id>/`, whole or absent, and the record of how it was made."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AliasChoices, Field, TypeAdapter, ValidationError

from distill_assets.foundation.errors import TrainingError
from distill_assets.foundation.files import replacing_folder, write_json, write_text
from distill_assets.foundation.settings import StudentSettings, TrainingSettings
from distill_assets.foundation.tokenizers import quiet_transformers
from distill_assets.foundation.written_files import hashes_below
from distill_assets.student_model.identity import StudentKind
from distill_assets.student_model.vocabulary import FitReport, StudentVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from distill_assets.student_model.lora import Adapters

RECORD_FILE, CARD_FILE = "distillation.json", "README.md"
ADAPTER = "adapter"  # a folder of its own: beside config.json transformers would take it for what to load
_TOOLS = ("distill_assets", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class UsedCapture:
    """One capture file a student learnt from. `chosen` says which rows, where it is not all: in hexadecimal digits,
    the first row is the highest bit.
    """

    shard: str
    version: str
    capture_id: str
    rows: int
    chosen: str | None = None


@dataclass(frozen=True)
class StudentSpec:
    """What a student is to be; `student_id` names it. `teacher` is the name the user wrote.

    `targets` are the target settings of the captures it learns from; a control has none.
    """

    student_id: str
    kind: StudentKind
    teacher: str
    origin: StudentSettings
    training: TrainingSettings
    vocabulary: StudentVocabulary
    captures: tuple[UsedCapture, ...]
    accepted_differences: tuple[str, ...] = ()
    targets: Mapping[str, Any] = field(default_factory=dict)

    @property
    def judged_by(self) -> str:
        """What the loss on validation rows is called: a divergence where it is one."""
        if self.kind == "control":
            return "cross-entropy"
        if self.has_drawn_targets or self.training.temperature != 1.0:
            return "loss"
        return {"forward_kl": "KL", "reverse_kl": "reverse KL", "jsd": "JSD"}.get(self.training.objective, "loss")

    @property
    def has_drawn_targets(self) -> bool:
        """Drawn ones give the gradient of a divergence, but not its value."""
        return bool(self.targets.get("kind", "top_k") != "top_k")


@dataclass(frozen=True)
class CurvePoint:
    """One optimiser step. Losses are nats a supervised position, `kd` is None for a control."""

    step: int
    loss: float
    kd: float | None
    ce: float
    tokens: int  # supervised positions of the step
    learning_rate: float


@dataclass(frozen=True)
class ValidationPoint:
    """Mean losses on the validation rows after a step of an epoch, nats a position; `kd` is None for a control."""

    epoch: int
    step: int
    kd: float | None
    ce: float

    @property
    def loss(self) -> float:
        """What early stopping goes by: what is distilled, without the tokens that came; of a control those."""
        return self.ce if self.kd is None else self.kd


@dataclass(frozen=True)
class Stopping:
    """What early stopping came to: the weights are those after `kept_step`, which had the lowest validation loss."""

    planned_steps: int
    made_steps: int
    kept_step: int
    kept_loss: float
    judged_by: str

    def in_words(self) -> str:
        stopped = self.made_steps < self.planned_steps
        end = f"stopped early, after {self.made_steps}" if stopped else "not stopped early, after all"
        return (
            f"{end} of {self.planned_steps} steps; kept are the weights after step {self.kept_step}, with the lowest "
            f"validation {self.judged_by}, {self.kept_loss:.4f} nats"
        )


@dataclass(frozen=True)
class StudentReport:
    """What training a student took and gave."""

    rows: int
    validation_rows: int
    steps: int
    supervised_tokens: int  # over all epochs
    seconds: float
    device: str
    fit: FitReport
    curve: tuple[CurvePoint, ...]
    validation: tuple[ValidationPoint, ...]
    stopping: Stopping | None = None  # with early stopping only

    @property
    def final_loss(self) -> float:
        return self.curve[-1].loss


@dataclass(frozen=True)
class StudentRecord:
    """What `distillation.json` says about a saved student. `files` is the SHA-256 of every other file; older records
    have `weights`, those of the weights alone, or none.
    """

    spec: StudentSpec
    report: StudentReport
    created: str  # UTC, ISO 8601; for people, part of no identity
    tools: Mapping[str, str]
    files: Annotated[Mapping[str, str], Field(validation_alias=AliasChoices("files", "weights"))] = field(
        default_factory=dict
    )

    @property
    def knows_all_files(self) -> bool:
        return CARD_FILE in self.files


_RECORD = TypeAdapter(StudentRecord)


def save_student(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: StudentSpec,
    report: StudentReport,
    adapters: Adapters | None = None,
) -> None:
    """Write weights, tokenizer, record and model card to `folder`; an interrupt leaves what was there.

    Adapters, which are merged already, lie beside where the model they were trained on can be had from elsewhere.
    """
    tools = {name: package_version(name) for name in _TOOLS} | {"python": platform.python_version()}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    with replacing_folder(folder) as beside:
        with quiet_transformers():
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            if adapters and spec.origin.model:
                adapters.save(beside / ADAPTER, spec.origin.model)
        record = StudentRecord(spec, report, created, tools)
        write_text(beside / CARD_FILE, _model_card(record))
        record = replace(record, files=hashes_below(beside))
        write_json(beside / RECORD_FILE, _RECORD.dump_python(record, mode="json"))


def read_student(folder: Path) -> StudentRecord:
    """The record of a saved student; TrainingError when it is missing or damaged."""
    file = folder / RECORD_FILE
    try:
        return _RECORD.validate_json(file.read_bytes())
    except FileNotFoundError:
        raise TrainingError(f"{folder}: no {RECORD_FILE}, so no student of ours; run again to train one") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        reason = f"{where}: {problem['msg']}" if where else problem["msg"]
        raise TrainingError(f"{file}: damaged ({reason}); delete the folder and run again") from error
    except OSError as error:
        raise TrainingError(f"{file}: cannot be read ({error.strerror}); delete the folder and run again") from error


def _model_card(record: StudentRecord) -> str:
    spec, report, training = record.spec, record.report, record.spec.training
    last = report.curve[-1]
    if spec.kind == "student":
        softened = "" if training.temperature == 1.0 else f" at temperature {training.temperature:g}"
        loss = "weighted cross-entropy" if spec.has_drawn_targets else training.objective + softened
        goal = (
            f"{training.kd_weight:g} x {loss} against the "
            f"captured next-token distributions of {spec.teacher} + {1 - training.kd_weight:g} x cross-entropy"
        )
    else:
        goal = f"cross-entropy on the tokens alone: the control of a student distilled from {spec.teacher}"
    captures = "\n".join(
        f"| {used.shard} | {used.version[:16]} | {used.capture_id} | {used.rows} |" for used in spec.captures
    )
    differences = ", ".join(spec.accepted_differences) or "none"
    return f"""---
library_name: transformers
tags: [knowledge-distillation]
---
# {spec.kind} {spec.student_id}

Made by distill_assets {record.tools["distill_assets"]}.

- Teacher: {spec.teacher}
- Start: {_origin(spec.origin)}
- Loss: {goal}
- Training: {training.epochs} epoch(s) of {report.rows} rows, {report.steps} steps of at most {training.batch_tokens}
  tokens, {report.supervised_tokens} supervised tokens in all, AdamW at {training.learning_rate:g}, seed {training.seed}
- Arithmetic: {training.precision}; weights float32
{_choice(training)}{_how_it_went(report, training)}- Loss of the last step: {last.loss:.4f} nats a token
- Tokenizer: the teacher's; differences taken on knowingly: {differences}
- Ids the student lacks: {report.fit.mass_dropped:.2%} of the teacher's probability lay on them; left out, and with them
  {report.fit.positions_dropped} positions whose token is one

| shard | version | capture | rows |
|---|---|---|---|
{captures}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")
```

Everything else, the loss of every step included, is in {RECORD_FILE}.
"""


def _choice(training: TrainingSettings) -> str:
    where = f"- Rows: of the training shards those with {training.where}\n" if training.where else ""
    mixture = ", ".join(f"{pattern} {passes:g}" for pattern, passes in training.mixture.items())
    return where + (f"- Passes an epoch over shards, where not one: {mixture}\n" if mixture else "")


def _how_it_went(report: StudentReport, training: TrainingSettings) -> str:
    lines = []
    if lora := training.lora:
        lines.append(
            f"- Adapters of rank {lora.rank} (alpha {lora.alpha:g}, dropout {lora.dropout:g}) on "
            f"{', '.join(lora.targets)} were trained, and merged into the weights"
        )
    if report.stopping:
        lines.append(f"- Early stopping: {report.stopping.in_words()}")
    return "".join(f"{line}\n" for line in lines)


def _origin(origin: StudentSettings) -> str:
    if origin.from_teacher_layers is not None:
        return f"layers {origin.from_teacher_layers} of the teacher, with its embeddings and head"
    if origin.config is not None:
        return f"random weights of a {origin.config['model_type']} configuration"
    return f"{origin.model}" + (f" at {origin.revision}" if origin.revision else "")
