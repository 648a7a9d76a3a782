"""What a student's id contains, and what it must not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from distill_assets.foundation.settings import LoraSettings, TargetSettings, TrainingSettings
from distill_assets.student_model.identity import student_id
from distill_assets.student_model.vocabulary import StudentVocabulary


@dataclass(frozen=True)
class Row:
    key: str
    weight: float = 1.0
    weighting: str = ""
    passes: float = 1.0


def an_id(kind: str = "student", **changes: Any) -> str:
    values: dict[str, Any] = {
        "rows": [Row("a"), Row("b", 2.0)],
        "validation": [Row("v")],
        "training": TrainingSettings(),
        "initial_weights": "w",
        "vocabulary": StudentVocabulary(100, (3,)),
        "tokenizer": "t",
        "capture_ids": ["c"],
        "targets": TargetSettings(),
    }
    return student_id(kind, **{**values, **changes})  # type: ignore[arg-type]


EVERYTHING = [
    {"rows": [Row("a")]},
    {"rows": [Row("a"), Row("b")]},
    {"rows": [Row("a"), Row("b", 2.0), Row("a")]},
    {"rows": [Row("a", passes=0.5), Row("b", 2.0)]},
    {"rows": [Row("a", weighting="0f"), Row("b", 2.0)]},
    {"training": TrainingSettings(where="row > 0")},
    {"validation": []},
    {"training": TrainingSettings(seed=1)},
    {"training": TrainingSettings(learning_rate=1e-3)},
    {"training": TrainingSettings(epochs=2)},
    {"training": TrainingSettings(precision="bfloat16")},
    {"initial_weights": "x"},
    {"vocabulary": StudentVocabulary(100)},
    {"tokenizer": "u"},
]
TARGETS = [
    {"capture_ids": ["d"]},
    {"capture_ids": ["c", "d"]},
    {"training": TrainingSettings(kd_weight=0.5)},
    {"training": TrainingSettings(objective="jsd")},
    {"training": TrainingSettings(temperature=2.0)},
]


@pytest.mark.parametrize("kind", ["student", "control"])
@pytest.mark.parametrize("change", EVERYTHING)
def test_what_the_weights_depend_on_is_in_the_id(kind: str, change: dict[str, Any]) -> None:
    assert an_id(kind, **change) != an_id(kind)


@pytest.mark.parametrize("change", TARGETS)
def test_targets_change_the_student_and_not_the_control(change: dict[str, Any]) -> None:
    assert an_id("student", **change) != an_id("student")
    assert an_id("control", **change) == an_id("control")


def test_order_is_not_in_the_id_and_kinds_differ() -> None:
    assert an_id(rows=[Row("b", 2.0), Row("a")]) == an_id()
    assert an_id(capture_ids=["c", "c"]) == an_id()
    assert an_id("control") != an_id("student")
    assert len(an_id()) == 16 and int(an_id(), 16) >= 0


def test_the_weight_of_tail_samples_is_in_the_id_only_where_there_are_some() -> None:
    changed = TrainingSettings(tail_sample_weight=1.0)
    sampled = {"targets": TargetSettings(k=8, tail_samples=4)}
    assert an_id(training=changed) == an_id()
    assert an_id(training=changed, **sampled) != an_id(**sampled)
    assert an_id("control", training=changed, **sampled) == an_id("control")


def test_a_mixture_is_in_the_id_by_what_it_comes_to() -> None:
    """Patterns name shards, and what a shard is called is not part of a student."""
    assert an_id(training=TrainingSettings(mixture={"s*": 0.5})) == an_id()
    rows = [Row("a", passes=0.5), Row("a"), Row("a", 2.0), Row("a", passes=2.0)]
    assert an_id(rows=rows) == an_id(rows=rows[::-1])


LORA, STOPS = LoraSettings(), {"early_stopping": 3}


def test_adapters_and_early_stopping_are_in_the_id_where_they_are_asked_for() -> None:
    def ids(**training: Any) -> tuple[str, str]:
        settings = {"training": TrainingSettings(**training)}
        return an_id(**settings), an_id("control", **settings)

    made = [
        ids(),
        ids(lora=LORA),
        ids(lora=LoraSettings(rank=8)),
        ids(lora=LoraSettings(targets=["q_proj"])),
        ids(**STOPS),
        ids(early_stopping=4),
        ids(**STOPS, validate_every=10),
    ]
    assert len({i for pair in made for i in pair}) == 2 * len(made)
    assert ids(validate_every=10) == ids()  # to look changes nothing
    assert ids(lora=LORA, freeze_embeddings=True) == ids(lora=LORA)  # adapters leave embeddings as they are


def test_students_of_plain_top_k_keep_the_id_they_always_had() -> None:
    assert (an_id(), an_id("control")) == ("6bbd6e8deac7cd57", "70e4deb6d8e4511b")
