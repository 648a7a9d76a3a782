"""What a student is made of, and its name: content, never time (DESIGN 4)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal, Protocol

from distill_assets.foundation.fingerprints import digest
from distill_assets.foundation.settings import TargetSettings, TrainingSettings
from distill_assets.student_model.vocabulary import StudentVocabulary

StudentKind = Literal["student", "control"]

RECIPE = 1  # raised when the same settings come to mean other arithmetic
TARGETS_ONLY = {
    "objective",
    "temperature",
    "kd_weight",
    "tail_sample_weight",
}  # training settings without effect on hard labels


class WeightedRow(Protocol):
    """Anything that knows its row key, weight, hash of position weights and passes an epoch; a `CapturedRow` does."""

    @property
    def key(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def weighting(self) -> str: ...
    @property
    def passes(self) -> float: ...


def student_id(
    kind: StudentKind,
    rows: Iterable[WeightedRow],
    validation: Iterable[WeightedRow],
    training: TrainingSettings,
    initial_weights: str,
    vocabulary: StudentVocabulary,
    tokenizer: str,
    capture_ids: Collection[str],
    targets: TargetSettings,
) -> str:
    """16 hexadecimal digits: rows with weights and passes (in any order), settings, initial weights, and so on.

    `initial_weights` is `initial_weights_fingerprint`'s answer, `tokenizer` the fingerprint of the
    tokenizer the student is saved with, `capture_ids` the captures whose targets are learnt from;
    `targets` says which training settings make a difference.
    A control is the same whatever the targets, so its id leaves captures and objective out.
    """
    control = kind == "control"
    learning = training.effective(targets)
    left_out = {"mixture", *(TARGETS_ONLY if control else ())}  # what a mixture comes to, the rows say
    return digest(
        {
            "recipe": RECIPE,
            "kind": kind,
            "rows": sorted(map(_learnt, rows)),
            "validation": sorted(map(_learnt, validation)),
            "training": {n: v for n, v in learning.items() if n not in left_out},
            "initial_weights": initial_weights,
            "vocabulary": [vocabulary.n_real, list(vocabulary.unused)],
            "tokenizer": tokenizer,
            "captures": [] if control else sorted(set(capture_ids)),
        }
    )


def _learnt(row: WeightedRow) -> list[str | float]:
    """A row as it makes a difference to the student; what says nothing is left out, so that ids stay as they were."""
    plain = row.passes == 1 and not row.weighting
    return [row.key, row.weight] if plain else [row.key, row.weight, row.passes, row.weighting]


def events_folder(root: Path, kind: StudentKind, student_id: str) -> Path:
    """Where below `root` the TensorBoard events of a student's training lie, under a name that says what it is."""
    return root / f"{kind}-{student_id}"


def student_of_events(name: str) -> str:
    """The student that a folder below that root belongs to."""
    return name.partition("-")[2]
