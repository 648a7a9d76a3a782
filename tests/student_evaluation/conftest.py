"""A tiny teacher, a tiny student that resembles it, and captured rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distill_assets.foundation.language_model import load_model
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.student_evaluation.evaluation import Evaluation, evaluate
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.teacher import Teacher
from tests import tiny
from tests.student_evaluation.capturing import random_rows


def load(folder: Path) -> PreTrainedModel:
    return load_model(ModelFolder(folder.name, folder, None), "float32", torch.device("cpu"))


@torch.no_grad()
def blurred(folder: Path, noise: float) -> PreTrainedModel:
    """The model with noise on its weights: the more, the farther from itself."""
    model = load(folder)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * noise)
    return model


@pytest.fixture(scope="session")
def teacher(teacher_folder: Path) -> PreTrainedModel:
    return load(teacher_folder)


@pytest.fixture(scope="session")
def student(teacher_folder: Path) -> PreTrainedModel:
    return blurred(teacher_folder, 0.05)


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Another random model, with a padded head."""
    return load(tiny.save_model(tmp_path_factory.mktemp("stranger"), tokenizer, seed=5, pad_head=7))


@pytest.fixture(scope="session")
def n_real(tokenizer: PreTrainedTokenizerFast) -> int:
    return len(tokenizer)


@pytest.fixture(scope="session")
def rows_by_shard(teacher: PreTrainedModel, n_real: int) -> dict[str, list[CapturedRow]]:
    rows = random_rows(teacher, 30, k=8, n_real=n_real, lengths=(8, 60))
    return {"heldout-a": rows[:18], "heldout-b": rows[18:]}


@pytest.fixture(scope="session")
def models(teacher_folder: Path, stranger: PreTrainedModel) -> dict[str, Callable[[], PreTrainedModel]]:
    """A good student, a worse control and an untrained stranger."""
    return {
        "untrained": lambda: stranger,
        "student": lambda: blurred(teacher_folder, 0.03),
        "control": lambda: blurred(teacher_folder, 0.12),
    }


@pytest.fixture(scope="session")
def evaluation(
    rows_by_shard: dict[str, list[CapturedRow]], models: dict[str, Callable[[], PreTrainedModel]], n_real: int
) -> Evaluation:
    """These models on two held-out shards, by the record alone."""
    return evaluate(rows_by_shard, models, StudentVocabulary(n_real))


@pytest.fixture(scope="session")
def dense_evaluation(
    rows_by_shard: dict[str, list[CapturedRow]],
    teacher: PreTrainedModel,
    models: dict[str, Callable[[], PreTrainedModel]],
    n_real: int,
) -> Evaluation:
    """The same with the teacher's whole distribution."""
    lent = nullcontext(Teacher(teacher, n_real, torch.tensor([], dtype=torch.int64)))
    return evaluate(rows_by_shard, models, StudentVocabulary(n_real), teacher=lambda: lent)
