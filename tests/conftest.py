"""Fixtures shared by all rooms. Offline, on loopback, nothing outside the repository."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny models threads only wait for each other: 15 s become 1
os.environ["DAGSTER_DISABLE_TELEMETRY"] = "yes"
os.environ.pop("DAGSTER_HOME", None)
os.environ.pop("DISTILL_HOME", None)

import pytest
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.bench import Bench


def pytest_collection_finish() -> None:
    """What was imported stays, so no collection of garbage, of which each training asks for some, need look at it."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.train_tokenizer()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny random Llama teacher of three layers; do not write into it."""
    return tiny.save_model(tmp_path_factory.mktemp("teacher"), tokenizer)


@pytest.fixture
def home(tmp_path: Path, teacher_folder: Path) -> Path:
    """A fresh home with three training shards and one held-out shard."""
    return tiny.make_home(tmp_path / "home", teacher_folder)


@pytest.fixture
def bench(home: Path) -> Bench:
    return Bench(home)
