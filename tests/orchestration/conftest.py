"""Fixtures of tests that open a home's Dagster instance."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Opening a home's instance sets these for the process; no test inherits them."""
    yield
    os.environ.pop("DAGSTER_HOME", None)
    os.environ.pop("DISTILL_HOME", None)
