"""The asset checks: what a run records of them, and that each can fail."""

from __future__ import annotations

import json
import os
from pathlib import Path

import dagster as dg

from distill_assets.definitions import defs
from distill_assets.foundation.home import Home
from distill_assets.orchestration import records
from distill_assets.orchestration.bring_up_to_date import bring_up_to_date
from distill_assets.orchestration.checks import catalog_matches_store, student_beats_control
from distill_assets.orchestration.instance import environment, open_instance
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import AssetStates
from distill_assets.student_evaluation.identity import JSON_FILE
from distill_assets.teacher_capture.teacher import load_teacher


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


CAPTURE_CHECKS = ("capture_is_complete", "capture_is_aligned", "capture_is_faithful")


def evaluations(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {evaluation.check_name: evaluation for evaluation in result.get_asset_check_evaluations()}


def n_check_runs(instance: dg.DagsterInstance) -> int:
    """Runs in which a check of the captures was evaluated."""
    evaluated = {dg.DagsterEventType.ASSET_CHECK_EVALUATION}
    names = [
        {str(r.event_log_entry.dagster_event.asset_check_evaluation_data.check_name) for r in found.records}  # type: ignore[union-attr]
        for found in (instance.get_records_for_run(run.run_id, of_type=evaluated) for run in instance.get_runs())
    ]
    return sum(bool(found & set(CAPTURE_CHECKS)) for found in names)


def test_a_run_checks_what_it_captured_once_and_nothing_when_nothing_was(home: Path) -> None:
    said: list[str] = []
    first = bring_up_to_date(defs, Home(home), device="cpu", on_step=said.append)
    assert set(first.checks) == set(CAPTURE_CHECKS)
    assert first.checks["capture_is_complete"] == {"passed": True, "found": "24 rows are those of 4 shards"}
    assert first.checks["capture_is_faithful"]["passed"] and "8 rows scored again" in str(
        first.checks["capture_is_faithful"]["found"]
    )
    assert said.count("checks of teacher_capture on what was captured") == 1
    # A random teacher is not good at guessing, which is no evidence of anything.
    aligned = first.checks["capture_is_aligned"]
    assert aligned["passed"] and str(aligned["found"]).endswith("no evidence for or against")
    assert first.report is not None
    with open_instance(Home(home)) as instance:
        assert n_check_runs(instance) == 1

    load_teacher.cache_clear()
    again = bring_up_to_date(defs, Home(home), device="cpu")
    assert again.checks == {} and load_teacher.cache_info().misses == 0
    (home / "shards" / "s2.jsonl").rename(home / "shards" / "s4.jsonl")
    moved = bring_up_to_date(defs, Home(home), device="cpu", only="tokenizer_compatibility")
    assert moved.checks == {}
    moved = bring_up_to_date(defs, Home(home), shards=["s4"], device="cpu")
    assert (moved.captured_shards, moved.rows_captured) == (["s4"], 0)
    assert set(moved.checks) == {"capture_is_complete", "capture_is_aligned"} and load_teacher.cache_info().misses == 0
    assert moved.checks["capture_is_complete"]["found"] == "6 rows are those of 1 shard"


def test_a_partition_is_checked_with_its_materialisation_and_all_without(home: Path) -> None:
    job = defs.resolve_implicit_global_asset_job_def()
    asset = dg.AssetKey("teacher_capture")
    with open_instance(Home(home)) as instance:
        records.observe_shards(instance, AssetStates(Pipeline(Home(home))))

        def made(**options: object) -> dict[str, dg.AssetCheckEvaluation]:
            return evaluations(job.execute_in_process(instance=instance, **options))  # type: ignore[arg-type]

        of_one = made(asset_selection=[asset], partition_key="s0")
        assert set(of_one) == set(CAPTURE_CHECKS)
        assert of_one["capture_is_complete"].passed and of_one["capture_is_complete"].metadata["rows"].value == 6
        assert of_one["capture_is_faithful"].metadata["rows"].value == 6
        made(asset_selection=[asset], partition_key="s1")

        keys = frozenset(dg.AssetCheckKey(asset, name) for name in CAPTURE_CHECKS)
        job = job.get_subset(asset_check_selection=keys)
        of_all = made()
        complete = of_all["capture_is_complete"]
        assert not complete.passed and complete.severity is dg.AssetCheckSeverity.ERROR
        assert complete.metadata["captures"].value == 2 and complete.metadata["rows"].value == 12
        assert complete.metadata["problems"].value == (
            "shard heldout has no current capture\nshard s2 has no current capture"
        )
        assert of_all["capture_is_faithful"].passed and of_all["capture_is_faithful"].metadata["rows"].value == 8
        positions = of_all["capture_is_aligned"].metadata["positions"].value
        assert positions and of_all["capture_is_aligned"].severity is dg.AssetCheckSeverity.WARN

        [file] = Path(home).glob("captures/*/s0@*.parquet")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        damaged = made()
        assert not any(damaged[name].passed for name in CAPTURE_CHECKS)
        assert str(file) in str(damaged["capture_is_aligned"].description)


def test_a_range_of_partitions_is_checked_as_one(home: Path) -> None:
    job = defs.resolve_implicit_global_asset_job_def()
    with open_instance(Home(home)) as instance:
        records.observe_shards(instance, AssetStates(Pipeline(Home(home))))
        tags = {"dagster/asset_partition_range_start": "s0", "dagster/asset_partition_range_end": "s1"}
        result = job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey("teacher_capture")], tags=tags)
        assert evaluations(result)["capture_is_complete"].metadata["captures"].value == 2
        assert evaluations(result)["capture_is_complete"].passed
