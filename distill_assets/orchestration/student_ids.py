"""The names of the students that should exist, without reading ten million row keys for each look at a home."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill_assets.capture_catalog.schema import SCHEMA_VERSION
from distill_assets.foundation.fingerprints import SHORT, HashCache, digest, file_stamp
from distill_assets.foundation.settings import TrainingSettings
from distill_assets.student_model.choice import Choice
from distill_assets.student_model.identity import RECIPE, StudentKind, student_id
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.teacher_capture.store import Capture

LEARNT_FROM = ("train", "validation")  # roles
_REMEMBERED = 1  # raised when an id would come out differently


def student_ids(
    kinds: Sequence[StudentKind],
    captures: Mapping[str, Sequence[Capture]],
    spec: CaptureSpec,
    training: TrainingSettings,
    initial_weights: str,
    vocabulary: StudentVocabulary,
    hashes: HashCache,
    choose: Callable[[str], Sequence[Choice]],
    anew: bool = False,
) -> dict[StudentKind, str]:
    """`student_id` of each kind. `captures` by role, each of LEARNT_FROM, of which `choose` says what is learnt from.

    Remembered as long as the capture files keep their stamps and all else is the same, unless asked `anew`:
    whoever makes something under these names does.
    """
    made_of = {
        "version": [_REMEMBERED, RECIPE],
        "kinds": kinds,
        "captures": sorted({capture.capture_id for role in LEARNT_FROM for capture in captures[role]}),
        "files": {role: [[c.shard, str(c.path), *file_stamp(c.path)] for c in captures[role]] for role in LEARNT_FROM},
        "catalog": SCHEMA_VERSION if training.where else None,  # what `where` asks means what it did
        "targets": spec.targets.model_dump(),
        "training": training.model_dump(),
        "initial_weights": initial_weights,
        "vocabulary": [vocabulary.n_real, vocabulary.unused],
        "tokenizer": spec.identity["tokenizer"],
    }

    def find_out() -> dict[StudentKind, str]:
        learnt = {role: choose(role) for role in LEARNT_FROM}
        rows = {role: [key for choice in learnt[role] for key in choice.row_keys()] for role in LEARNT_FROM}
        capture_ids = {choice.capture.capture_id for role in LEARNT_FROM for choice in learnt[role]}
        return {
            kind: student_id(
                kind,
                rows["train"],
                rows["validation"],
                training,
                initial_weights,
                vocabulary,
                spec.identity["tokenizer"],
                capture_ids,
                spec.targets,
            )
            for kind in kinds
        }

    signature = digest(made_of, 64)
    found = hashes.value_of("students", signature, find_out, anew)
    if not _are_ids(found, kinds):  # somebody's hand was in the file; what it says is no reason to fail
        found = hashes.value_of("students", signature, find_out, anew=True)
    return {kind: found[kind] for kind in kinds}


def _are_ids(found: Any, kinds: Sequence[StudentKind]) -> bool:
    return isinstance(found, dict) and all(
        isinstance(name := found.get(kind), str) and len(name) == SHORT and set(name) <= set("0123456789abcdef")
        for kind in kinds
    )
