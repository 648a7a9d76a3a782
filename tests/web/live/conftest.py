"""The home that is edited while the server runs on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.web.home import LiveHome


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, request: pytest.FixtureRequest) -> LiveHome:
    """The file's TRAINING shards s0, s1, ... and a held-out one, looked at every second, refreshed every minute."""
    shards = len(request.module.TRAINING)
    root = tmp_path_factory.mktemp("live") / "home"
    automation = {"watch_seconds": 1, "schedule": "* * * * *"}
    return LiveHome(tiny.make_home(root, teacher_folder, shards=shards, automation=automation))
