"""What a person sees in the web UI: columns, pictures, where the code is, and why a run ran."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest

from distill_assets.capture_catalog.query import mass_by_rank
from distill_assets.definitions import defs
from distill_assets.foundation.settings import TargetSettings
from distill_assets.orchestration import metadata, summaries
from distill_assets.orchestration.assets import CAPTURED_TAG, WHY_TAG
from distill_assets.orchestration.instance import open_instance
from distill_assets.orchestration.partitions import sync_partitions
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.teacher_capture.arrow import capture_schema
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.store import read_rows
from tests import tiny
from tests.bench import Bench


@pytest.mark.parametrize(
    "targets",
    [{"tail_samples": 2}, {"kind": "sampled", "precision": "exact"}, {"kind": "threshold"}],
    ids=lambda targets: "-".join(map(str, targets.values())),
)
def test_every_column_of_a_capture_is_described_with_its_type(targets: dict[str, Any]) -> None:
    described = {column.name: column.type for column in metadata.CAPTURE_COLUMNS.columns}
    for field in capture_schema(TargetSettings(**targets), position_weights=True):
        assert described[field.name] == re.sub("item: |element: | not null", "", str(field.type))


def test_the_catalogs_picture_shows_the_mass_of_the_first_ids(bench: Bench) -> None:
    entries = [capture_shard(bench.spec, shard, bench.store, device="cpu").capture for shard in bench.shards.values()]
    Pipeline(bench.home).refresh_catalog()
    [capture] = [capture for capture in entries if capture.shard == "s1"]
    targets = [row.targets for row in read_rows(capture.path)[:2]]
    kept = np.concatenate([np.exp(t.support_logprobs_N).reshape(t.n_positions, -1) for t in targets])
    whole = kept.sum() + sum(np.exp(t.tail_logprob_P.astype(float)).sum() for t in targets)
    found = mass_by_rank(bench.home.catalog, bench.home.captures, ["s1"], 2)
    assert found == pytest.approx((kept.sum(0) / whole).tolist(), rel=1e-5)
    text = summaries.of_catalog(Pipeline(bench.home))
    assert "| examples | 24 |" in text and "![mass kept](data:image/png;base64,iVBOR" in text
    assert "From the first 8 rows of 4 of 4 shards." in text


def test_a_catalog_of_nothing_has_no_picture(bench: Bench) -> None:
    Pipeline(bench.home).refresh_catalog()
    assert summaries.of_catalog(Pipeline(bench.home)) == ""


def test_the_catalogs_page_shows_the_summary_before_a_few_of_thousands_of_captures(bench: Bench) -> None:
    for shard in bench.shards.values():
        capture_shard(bench.spec, shard, bench.store, device="cpu")
    pipeline = Pipeline(bench.home)
    report = pipeline.refresh_catalog()
    values = metadata.of_catalog(report, pipeline)
    assert list(values)[-3:] == ["summary", "file", "captures"]
    assert [record.data["shard"] for record in values["captures"].records] == ["heldout", "s0", "s1", "s2"]
    pipeline.entries = pipeline.entries * 6
    many = metadata.of_catalog(replace(report, shards=24), pipeline)
    assert len(many["the first 20 captures"].records) == 20 and "captures" not in many


@pytest.fixture
def instance(bench: Bench) -> Iterator[dg.DagsterInstance]:
    with open_instance(bench.home) as instance:
        yield instance
    os.environ.pop("DAGSTER_HOME", None)
    os.environ.pop("DISTILL_HOME", None)


def test_a_run_says_why_and_how_much_it_captured_however_it_was_started(
    bench: Bench, instance: dg.DagsterInstance
) -> None:
    def materialize(key: str) -> tuple[str, str]:
        result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey("teacher_capture")],
            partition_key=key,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
        run = instance.get_run_by_id(result.run_id)
        assert run is not None
        return run.tags[WHY_TAG], run.tags[CAPTURED_TAG]

    Pipeline(bench.home).check_tokenizers()
    sync_partitions(instance, set(bench.shards))
    assert materialize("s0") == ("new", "6 of 6 rows")
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", [*tiny.example_rows(6), *tiny.example_rows(2, start=70)])
    assert materialize("s0") == ("changed", "2 of 8 rows")
    assert materialize("s0") == ("current", "nothing, all was current")
    assert metadata.why(["new", "changed", "new"]) == "1 changed, 2 new" and metadata.why([]) == ""
    assert metadata.why(["current"], force=True) == "forced"


def test_the_assets_name_their_code() -> None:
    made_here = [node for node in defs.resolve_asset_graph().asset_nodes if node.is_materializable]
    assert len(made_here) == 6
    for node in made_here:
        [reference] = node.metadata["dagster/code_references"].code_references
        assert Path(reference.file_path).name == "assets.py" and reference.line_number > 1
