"""distill.yaml as frozen, described, validated values.

The file says *what* is made and alone feeds identities; *how* it is made (device,
tokens a forward pass) is Dagster run configuration and never part of these models. Every error names the file,
the line, the key and what is allowed there.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from distill_assets.foundation.cron import is_cron
from distill_assets.foundation.errors import SettingsError

SETTINGS_FILE = "distill.yaml"

Dtype = Literal["float32", "bfloat16", "float16"]
Objective = Literal["forward_kl", "reverse_kl", "jsd", "renormalized"]
Precision = Literal["float32", "bfloat16"]
_YAML_TEXT_FLOAT = re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+")  # 2e-4: a number everywhere but in YAML 1.1
NonEmpty = Annotated[str, Field(min_length=1)]
ALL_LINEAR = "all-linear"


class Spec(BaseModel):
    """A section of the file: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def applies(self, name: str) -> bool:
        """Whether the key says anything here; one that does not stands as a comment in a written file."""
        return getattr(self, name) is not None


class TeacherSettings(Spec):
    """The model whose next-token distributions are recorded."""

    model: NonEmpty = Field(description="hub id (owner/name) or folder, relative to this file")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id; resolved to a commit")
    dtype: Dtype = Field("bfloat16", description="compute dtype; float32 on a CPU, where bfloat16 is slow")


class StudentSettings(Spec):
    """Where the student's initial weights come from: exactly one of three."""

    model: NonEmpty | None = Field(None, description="hub id or folder of a model to start from")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    from_teacher_layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="teacher layers to keep, in order; embeddings and head come along"
    )
    config: dict[str, Any] | None = Field(
        None, description="a transformers configuration (with model_type); random initial weights"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> StudentSettings:
        given = [name for name in ("model", "from_teacher_layers", "config") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of model, from_teacher_layers, config (given: {', '.join(given) or 'none'})"
            )
        if self.revision is not None and self.model is None:
            raise ValueError("revision belongs to model; remove it")
        if self.from_teacher_layers is not None:
            layers = self.from_teacher_layers
            if any(later <= earlier for earlier, later in pairwise(layers)):
                raise ValueError("from_teacher_layers must be strictly increasing")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type, such as llama")
        return self

    def in_words(self) -> str:
        """What the student was before it was trained: `layers 0, 4, 8 of the teacher`."""
        if self.from_teacher_layers is not None:
            return f"layers {', '.join(map(str, self.from_teacher_layers))} of the teacher"
        if self.config is not None:
            rest = ", ".join(f"{name} {value}" for name, value in self.config.items() if name != "model_type")
            return f"random weights of a {self.config['model_type']}{f' with {rest}' if rest else ''}"
        return f"{self.model}{f' at {self.revision}' if self.revision else ''}"


class TokenizerSettings(Spec):
    """Differences between the two tokenizers the user takes on knowingly."""

    accept: list[NonEmpty] = Field(
        default_factory=list, description="names of differences `distill check` reported, to be accepted"
    )
    max_missing_mass: float = Field(
        0.01,
        ge=0.0,
        le=1.0,
        description="verdict subset: most of the teacher's probability, on average, on ids the student lacks",
    )


class DataSettings(Spec):
    """Which files are shards, and how their rows become ids and a loss mask."""

    shards: NonEmpty = Field("shards/*", description="glob of shard files, relative to this file")
    heldout: list[NonEmpty] = Field(
        default_factory=lambda: ["heldout*"], description="patterns of shard keys: captured, never trained on"
    )
    validation: list[NonEmpty] = Field(
        default_factory=list, description="patterns of shard keys: watched during training, never trained on"
    )
    max_length: int = Field(2048, ge=2, description="longest row in tokens; the rest is cut and counted")
    supervise: Literal["completion", "all"] = Field(
        "completion", description="completion: completions and assistant turns are targets; all: every token"
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail", description="fail: a bad row fails its shard; skip: it is left out, counted and listed"
    )

    @field_validator("shards")
    @classmethod
    def _inside(cls, pattern: str) -> str:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise ValueError("must be a pattern inside the home, such as shards/*.jsonl")
        return pattern


# The kind of targets a key belongs to; keys that are not here belong to all kinds.
_ONLY_FOR = {
    "k": "top_k",
    "min_probability": "top_k",
    "tail_samples": "top_k",
    "samples": "sampled",
    "tau": "threshold",
}


class TargetSettings(Spec):
    """How much of each next-token distribution is kept."""

    kind: Literal["top_k", "sampled", "threshold"] = Field(
        "top_k",
        description="top_k: the k likeliest ids and the mass of the rest; sampled: ids drawn from the distribution; "
        "threshold: all likely ids, some of the others",
    )
    k: int = Field(64, ge=1, description="top_k: most ids kept at a position")
    min_probability: float = Field(
        0.0, ge=0.0, lt=1.0, description="top_k: of the k, only ids at least this likely (always the first)"
    )
    tail_samples: int = Field(
        0, ge=0, description="top_k: ids drawn besides from the rest, which tell how it is spread"
    )
    samples: int = Field(50, ge=1, description="sampled: draws at a position, with replacement")
    tau: float = Field(
        0.02,
        ge=1.0e-4,
        lt=1.0,
        description="threshold: ids at least this likely are kept; any other with probability p / tau, at weight tau",
    )
    precision: Literal["compact", "exact"] = Field(
        "compact", description="compact: log-probabilities in steps of 1/16 nat; exact: float32"
    )

    @field_validator(*_ONLY_FOR)
    @classmethod
    def _belongs_to_the_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """Runs for what the file gives, not for defaults; `kind` is absent where it is itself refused."""
        own = _ONLY_FOR[str(info.field_name)]
        if info.data.get("kind", own) != own:
            raise ValueError(f"belongs to kind {own}, and kind is {info.data['kind']}; remove it")
        return value

    def applies(self, name: str) -> bool:
        return _ONLY_FOR.get(name, self.kind) == self.kind

    @property
    def has_weights(self) -> bool:
        """Whether kept ids carry weights of their own, because chance had a part in keeping them."""
        return self.kind != "top_k"

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these targets from others: the keys of their kind, and tail samples where there are some."""
        values = {name: value for name, value in self.model_dump().items() if self.applies(name)}
        if not self.tail_samples:
            values.pop("tail_samples", None)
        return values


# What a new home is given: about as good a student as other targets of so many bytes made (benchmarks/quality.py), from
# likeliest ids, which other tools can use too. A file without `targets` keeps the likeliest ids alone.
RECOMMENDED_TARGETS = TargetSettings(k=64, min_probability=0.01, tail_samples=4)


class LoraSettings(Spec):
    """Adapters that are trained in the place of the weights they stand beside."""

    rank: int = Field(16, ge=1, description="width of an adapter")
    alpha: float = Field(32.0, gt=0.0, description="an adapter counts alpha / rank")
    targets: list[NonEmpty] = Field(
        default_factory=lambda: [ALL_LINEAR],
        min_length=1,
        description="names of linear layers, such as q_proj; all-linear: all of the body. Never the head",
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="of what goes into an adapter, while it is trained")


class TrainingSettings(Spec):
    """How the student learns. What changes its weights is part of the student's identity."""

    where: NonEmpty | None = Field(
        None,
        description="SQL condition on the catalog's examples, such as mean_entropy < 4 AND NOT truncated: of the "
        "training rows only those that fulfil it are learnt from",
    )
    mixture: dict[NonEmpty, Annotated[float, Field(ge=0.0, le=1000.0)]] = Field(
        default_factory=dict,
        description="passes an epoch over shards by patterns of their keys, the first that fits, such as {web*: 0.5, "
        "math*: 2.0}; other shards have one, and 0 leaves them out",
    )
    objective: Objective = Field(
        "forward_kl",
        description="forward_kl, reverse_kl, jsd: on the kept ids with one bucket for the tail; renormalized: forward "
        "KL without the tail, biased, to compare with; sampled and threshold targets know forward_kl only",
    )
    temperature: float = Field(
        1.0,
        gt=0.0,
        le=100.0,
        description="forward_kl of top_k: softens which of the kept ids, never how much the tail has",
    )
    kd_weight: float = Field(0.9, ge=0.0, le=1.0, description="weight of distillation; the rest is cross-entropy")
    tail_sample_weight: float = Field(
        0.5, ge=0.0, le=1.0, description="with tail_samples: 0 is the bucket alone, 1 no bias and the most variance"
    )
    epochs: int = Field(1, ge=1, description="passes over the training rows")
    # AdamW's float32 arithmetic raises an error of its own from 1e38 on.
    learning_rate: float = Field(2.0e-4, gt=0.0, le=1.0e30, description="peak learning rate of AdamW")
    warmup_ratio: float = Field(0.05, ge=0.0, le=1.0, description="share of the steps spent warming up")
    weight_decay: float = Field(0.0, ge=0.0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0.0, description="gradients are clipped to this norm")
    batch_tokens: int = Field(2048, ge=2, description="most tokens, padding included, in one optimiser step")
    precision: Precision = Field(
        "float32",
        description="float32; bfloat16: passes in it, fast on a GPU and slow on a CPU; weights, loss and optimiser in "
        "float32",
    )
    freeze_embeddings: bool = Field(False, description="keep input embeddings (and a tied head) as they start")
    lora: LoraSettings | None = Field(
        None,
        description="train adapters alone, which are merged into the weights at the end: {rank: 16, alpha: 32.0, "
        "targets: [all-linear], dropout: 0.0}",
    )
    validate_every: int | None = Field(
        None, ge=1, description="steps between two looks at the validation rows; without it, after each epoch"
    )
    early_stopping: int | None = Field(
        None,
        ge=1,
        description="looks without a better validation loss before training stops; the best weights are kept",
    )
    seed: int = Field(0, ge=0, description="seed of the row order and of random weights")

    @field_validator("temperature")
    @classmethod
    def _belongs_to_the_objective(cls, value: float, info: ValidationInfo) -> float:
        if value != 1.0 and (objective := info.data.get("objective", "forward_kl")) != "forward_kl":
            raise ValueError(f"belongs to objective forward_kl, and objective is {objective}; remove it")
        return value

    @property
    def needs_validation(self) -> str | None:
        """Of the settings that are given, one that means nothing without validation rows."""
        given = (name for name in ("early_stopping", "validate_every") if getattr(self, name) is not None)
        return next(given, None)

    def effective(self, targets: TargetSettings) -> dict[str, Any]:
        """The settings that make a difference to a student of these targets."""
        without = set() if targets.tail_samples else {"tail_sample_weight"}
        if self.temperature == 1.0:
            without.add("temperature")
        if self.where is None:
            without.add("where")
        if not self.mixture:
            without.add("mixture")
        if self.precision == "float32":
            without.add("precision")
        without.add("lora" if self.lora is None else "freeze_embeddings")  # adapters leave embeddings as they are
        if self.early_stopping is None:  # else looking at the validation rows changes nothing
            without |= {"early_stopping", "validate_every"}
        return self.model_dump(exclude=without)


class EvaluationSettings(Spec):
    """What the held-out figures are made against."""

    dense: bool = Field(
        False,
        description="true: the teacher runs once more over the held-out rows, for figures on its whole distribution; "
        "false: its record alone",
    )


class AutomationSettings(Spec):
    """When Dagster runs by itself. Read when the web UI or daemon starts."""

    start: bool = Field(False, description="start the sensor, conditions and schedule without a click")
    watch_seconds: int = Field(15, ge=1, description="how often shards are looked at for changes")
    schedule: NonEmpty = Field("0 2 * * *", description="cron expression of the refresh")

    @field_validator("schedule")
    @classmethod
    def _is_cron(cls, schedule: str) -> str:
        if not is_cron(schedule):
            raise ValueError(
                f"{schedule!r} is no cron expression; give minute, hour, day, month and weekday, such as 0 2 * * *"
            )
        return schedule


class Settings(Spec):
    """All of distill.yaml."""

    teacher: TeacherSettings
    student: StudentSettings
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings = DataSettings()
    targets: TargetSettings = TargetSettings()
    training: TrainingSettings = TrainingSettings()
    control: bool = Field(True, description="also train the hard-label control student")
    evaluation: EvaluationSettings = EvaluationSettings()
    automation: AutomationSettings = AutomationSettings()

    @field_validator("training")
    @classmethod
    def _fits_the_targets(cls, training: TrainingSettings, info: ValidationInfo) -> TrainingSettings:
        """`targets` is absent where it is itself refused."""
        targets = info.data.get("targets", TargetSettings())
        if targets.has_weights and training.objective != "forward_kl":
            raise ValueError(f"objective {training.objective} needs top_k targets, and targets.kind is {targets.kind}")
        if targets.has_weights and training.temperature != 1.0:
            raise ValueError(f"temperature needs top_k targets, and targets.kind is {targets.kind}; remove it")
        if targets.tail_samples and training.tail_sample_weight and training.objective != "forward_kl":
            raise ValueError(
                f"tail samples belong to objective forward_kl, and objective is {training.objective}; "
                "set tail_sample_weight: 0.0"
            )
        return training

    @field_validator("training")
    @classmethod
    def _has_what_it_looks_at(cls, training: TrainingSettings, info: ValidationInfo) -> TrainingSettings:
        data = info.data.get("data")
        if (needs := training.needs_validation) and data is not None and not data.validation:
            raise ValueError(f"{needs} needs validation rows; name shards for them in data.validation, or remove it")
        return training


def load_settings(file: Path) -> Settings:
    """Read and validate a distill.yaml; SettingsError names the file, line, key and what is allowed."""
    try:
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise SettingsError(f"{file} does not exist; `distill init {file.parent}` writes one") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read ({error.strerror})") from error
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_duplicate_keys(tree, file)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SettingsError(f"{file}{where}: not valid YAML ({problem})") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{file}: must be a mapping with at least teacher and student")
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(problem, tree, file) for problem in error.errors()[:3])) from None


def _refuse_duplicate_keys(node: yaml.Node | None, file: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise SettingsError(f"{file} line {key.start_mark.line + 1}: a key must be one word")
            if key.value in seen:
                raise SettingsError(f"{file} line {key.start_mark.line + 1}: {key.value} is given twice; keep one")
            seen.add(key.value)
            _refuse_duplicate_keys(value, file)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicate_keys(item, file)


def _line_of(location: tuple[int | str, ...], node: yaml.Node | None) -> int:
    """1-based line of the deepest part of `location` that the file contains."""
    line = node.start_mark.line + 1 if node is not None else 1
    for part in location:
        found: tuple[yaml.Node, int] | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    found = value, key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part], node.value[part].start_mark.line + 1
        if found is None:
            break
        node, line = found
    return line


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Settings
    for part in location:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        sections = [kind for kind in _kinds(field.annotation if field else None) if issubclass(kind, BaseModel)]
        if not sections:
            break
        [model] = sections
    return list(model.model_fields)


def _kinds(annotation: Any) -> list[type]:
    """The classes of an annotation: of `Section | None` two."""
    return [kind for kind in (get_args(annotation) or (annotation,)) if isinstance(kind, type)]


def _explain(problem: Any, tree: yaml.Node | None, file: Path) -> str:
    location = problem["loc"]
    key = ".".join(str(part) for part in location) or "settings"
    where = f"{file} line {_line_of(location, tree)}: {key}"
    if problem["type"] == "extra_forbidden":
        return f"{where} is not a setting; allowed here: {', '.join(_fields_at(location[:-1]))}"
    if problem["type"] == "missing":
        return f"{where} is missing; add it"
    given = problem["input"]
    if problem["type"] == "model_type":
        return f"{where} must be a mapping (given: {given!r}); allowed here: {', '.join(_fields_at(location))}"
    if problem["type"] == "float_type" and isinstance(given, str) and _YAML_TEXT_FLOAT.fullmatch(given):
        return f"{where}: YAML reads {given} as text; write a number with a dot, such as 2.0e-4"
    message = problem["msg"].removeprefix("Value error, ")
    said = "" if isinstance(given, dict | list) or problem["type"] == "value_error" else f" (given: {given!r})"
    return f"{where}: {message[0].lower()}{message[1:]}{said}"
