"""The asset checks: what a run records of them, and that each can fail."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from distill_assets.definitions import defs
from distill_assets.foundation.home import Home
from distill_assets.orchestration.bring_up_to_date import bring_up_to_date
from distill_assets.orchestration.checks import catalog_matches_store, student_beats_control
from distill_assets.orchestration.instance import environment, open_instance
from distill_assets.student_evaluation.report import JSON_FILE


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Opening a home's instance sets these for the process; no test inherits them."""
    yield
    os.environ.pop("DAGSTER_HOME", None)
    os.environ.pop("DISTILL_HOME", None)


def outcome(check: dg.AssetChecksDefinition) -> dg.AssetCheckResult:
    result = check()
    assert isinstance(result, dg.AssetCheckResult)
    return result


def test_checks_run_with_their_assets_and_can_fail(home: Path) -> None:
    report = bring_up_to_date(defs, Home(home), device="cpu")
    with open_instance(Home(home)) as instance:
        keys = [
            dg.AssetCheckKey(dg.AssetKey(asset), name)
            for asset, name in (
                ("tokenizer_compatibility", "tokenizers_are_compatible"),
                ("capture_catalog", "catalog_matches_store"),
                ("student_evaluation", "student_beats_control"),
            )
        ]
        summaries = instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
        assert set(summaries) == set(keys)
        assert summaries[keys[0]].status.value == summaries[keys[1]].status.value == "SUCCEEDED"

    os.environ.update(environment(Home(home)))
    assert outcome(catalog_matches_store).passed
    (home / "catalog.duckdb").unlink()
    assert not outcome(catalog_matches_store).passed

    file = Path(str(report.report)).with_name(JSON_FILE)
    record = json.loads(file.read_text())
    for said, passes in (("closer", True), ("not closer", False)):
        file.write_text(json.dumps(record | {"rival": "control", "outcome": said}))
        result = outcome(student_beats_control)
        assert result.passed is passes and result.severity is dg.AssetCheckSeverity.WARN
    file.write_text(json.dumps(record | {"rival": "untrained", "outcome": "closer"}))
    assert outcome(student_beats_control).passed
