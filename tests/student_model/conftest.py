"""The room's teacher as an object, and rows captured from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distill_assets.foundation.language_model import load_model
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from tests.student_model.rows import captured_rows


@pytest.fixture(scope="session")
def teacher(teacher_folder: Path) -> ModelFolder:
    return ModelFolder("tiny-teacher", teacher_folder, None)


@pytest.fixture(scope="session")
def teacher_model(teacher: ModelFolder) -> PreTrainedModel:
    return load_model(teacher, "float32", torch.device("cpu"))


@pytest.fixture(scope="session")
def rows(teacher_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[CapturedRow]:
    return captured_rows(teacher_model, tokenizer, 10)
