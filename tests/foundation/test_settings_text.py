from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from distill_assets.foundation.settings import (
    RECOMMENDED_TARGETS,
    LoraSettings,
    Settings,
    TrainingSettings,
    load_settings,
)
from distill_assets.foundation.settings_text import commented_settings, init_text

CASES = {
    "defaults": {"teacher": {"model": "a/b"}, "student": {"model": "c/d"}},
    "awkward words": {
        "teacher": {"model": "C: # 1, {x}", "revision": "1e5"},
        "student": {"from_teacher_layers": list(range(0, 60, 2))},
        "tokenizer": {"accept": ["eos_token", "yes", "null", "3", "Übermut: [x]"]},
        "data": {"shards": "*.jsonl", "heldout": ["held, out*", "'"], "validation": []},
        "training": {
            "learning_rate": 1.0e-7,
            "kd_weight": 1.0,
            "seed": 123456789012,
            "where": "id LIKE 'a: # \"b\"%'\nAND tokens > 3",
            "mixture": {"web: [*]": 0.5, "*": 2.0},
        },
        "control": False,
    },
    "drawn targets": {
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "targets": {"kind": "sampled", "samples": 12, "precision": "exact"},
    },
    "adapters, watched": {
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "data": {"validation": ["val*"]},
        "training": {
            "lora": {"rank": 8, "alpha": 1.0e-7, "targets": ["q_proj", "mlp.up_proj"], "dropout": 0.1},
            "early_stopping": 3,
            "validate_every": 100,
        },
    },
    "a student from scratch": {
        "teacher": {"model": "t", "dtype": "float16"},
        "student": {"config": {"model_type": "llama", "rope": {"factor": 2.0, "kinds": ["a", None]}, "tied": True}},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_text_loads_back_as_the_same_settings(tmp_path: Path, case: str) -> None:
    settings = Settings.model_validate(CASES[case])
    file = tmp_path / "distill.yaml"
    file.write_text(commented_settings(settings), encoding="utf-8")
    assert load_settings(file) == settings


def test_every_key_stands_once_with_a_comment() -> None:
    lines = init_text("a/b", "c/d").splitlines()
    for section, field in Settings.model_fields.items():
        (head,) = [line for line in lines if line.startswith(f"{section}:")]
        assert "  # " in head
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            start = lines.index(head)
            block = lines[start + 1 : lines.index("", start) if "" in lines[start:] else None]
            keys = list(field.annotation.model_fields)
            assert [line.split(":")[0].strip(" #") for line in block] == keys
            for line, described in zip(block, field.annotation.model_fields.values(), strict=True):
                assert described.description
                assert line.endswith(described.description)


def test_a_new_home_has_the_recommended_targets(tmp_path: Path) -> None:
    file = tmp_path / "distill.yaml"
    file.write_text(init_text("a/b", "c/d"), encoding="utf-8")
    assert load_settings(file).targets == RECOMMENDED_TARGETS


def test_choices_that_the_description_does_not_name_are_listed() -> None:
    assert "dtype: bfloat16  # float32, bfloat16, float16: compute dtype" in init_text("a/b", "c/d")
    assert "supervise: completion  # completion: completions and" in init_text("a/b", "c/d")


def test_a_key_without_a_value_is_a_comment() -> None:
    assert "\n  # revision: null  # branch, tag or commit" in init_text("a/b", "c/d")


def test_what_is_shown_of_adapters_is_what_they_are_by_default() -> None:
    description = TrainingSettings.model_fields["lora"].description or ""
    assert LoraSettings.model_validate(yaml.safe_load(description[description.index("{") :])) == LoraSettings()


def test_settings_of_other_kinds_of_targets_are_comments() -> None:
    settings = Settings.model_validate(CASES["drawn targets"])
    text = commented_settings(settings)
    assert "\n  # k: 64  # top_k: " in text and "\n  # tau: 0.02  # threshold: " in text
    assert "\n  samples: 12  # sampled: " in text and "\n  precision: exact  # " in text
