"""What changes a capture's name, and what must not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distill_assets.foundation.errors import ModelError, SettingsError
from tests import tiny
from tests.bench import Bench, edit


def edited(home: Path, **sections: dict[str, object]) -> str:
    edit(home, **sections)
    return Bench(home).spec.capture_id


@pytest.mark.parametrize(
    "section",
    [
        {"targets": {"k": 7}},
        {"targets": {"min_probability": 0.01}},
        {"targets": {"precision": "exact"}},
        {"data": {"max_length": 32}},
        {"data": {"supervise": "all"}},
        {"teacher": {"dtype": "bfloat16"}},
    ],
)
def test_capture_settings_change_the_identity(home: Path, section: dict[str, dict[str, object]]) -> None:
    assert edited(home) != edited(home, **section)


@pytest.mark.parametrize(
    "section",
    [
        {"student": {"from_teacher_layers": [0]}},
        {"training": {"epochs": 5}},
        {"data": {"heldout": ["s0"]}},
        {"data": {"on_bad_row": "skip"}},
        {"automation": {"watch_seconds": 3}},
    ],
)
def test_other_settings_do_not(home: Path, section: dict[str, dict[str, object]]) -> None:
    assert edited(home) == edited(home, **section)


def test_identity_is_the_teachers_content_not_its_place(home: Path, teacher_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(teacher_folder, copy)
    assert edited(home) == edited(home, teacher={"model": str(copy)})
    other = tiny.save_model(tmp_path / "other", tiny.train_tokenizer(), seed=1)
    assert edited(home) != edited(home, teacher={"model": str(other)})


def test_impossible_settings_are_refused_by_name(home: Path) -> None:
    with pytest.raises(SettingsError, match=r"targets\.k is 400, but .* has only 320 token ids; use at most 320"):
        edited(home, targets={"k": 400})
    with pytest.raises(ModelError, match=r"data\.max_length is 999, but .* 256 positions"):
        edited(home, targets={"k": 4}, data={"max_length": 999})
