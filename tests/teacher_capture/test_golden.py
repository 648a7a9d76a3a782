"""Capture files of format version 1 that were written once and must stay readable.

`capture-v1-*.parquet` are never made again: `top_k` was written by the first version of the writer, with
other encodings than today's; all but `not_null` say that what is kept of a position may be null, as files did at first.
Beside each lies its content as JSON.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import polars
import pyarrow.parquet as pq
import pytest

from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.arrow import capture_schema, older_schema, to_arrow
from distill_assets.teacher_capture.inspection import inspect_capture
from distill_assets.teacher_capture.store import read_capture, read_rows

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("capture-v1-*.parquet"))
NOT_NULL = [file for file in FILES if file.stem.endswith(".not_null")]


def content(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((GOLDEN / f"{file.name.split('.')[0]}.json").read_text(encoding="utf-8"))
    return found


def test_all_kinds_are_there() -> None:
    assert [file.stem.removeprefix("capture-v1-") for file in FILES] == [
        "exact",
        "sampled",
        "tail_samples.not_null",
        "tail_samples",
        "threshold",
        "top_k",
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_of_version_1_is_read_as_it_was_written(file: Path) -> None:
    expected = content(file)
    capture, rows = read_capture(file), read_rows(file)
    assert capture.identity["format"] == 1
    assert capture.stats.rows == len(rows) == len(expected) == 3
    for row, stored in zip(rows, expected, strict=True):
        targets = row.targets
        assert (row.row, row.key, row.id, row.weight, row.truncated) == tuple(
            stored[name] for name in ("row", "key", "id", "weight", "truncated")
        )
        assert row.input_ids.tolist() == stored["input_ids"]
        assert targets.positions_P.tolist() == stored["positions"]
        assert targets.support_ids_N.tolist() == [i for ids in stored["support_ids"] for i in ids]
        if "support_q" in stored:
            logprobs = [-q / 16 for qs in stored["support_q"] for q in qs]
        else:
            logprobs = [x for values in stored["support_logprobs"] for x in values]
        assert targets.support_logprobs_N.tolist() == logprobs
        assert targets.tail_logprob_P.tolist() == [-np.inf if x is None else x for x in stored["tail_logprob"]]
        assert targets.gold_logprob_P.tolist() == stored["gold_logprob"]
        assert targets.entropy_P.tolist() == stored["entropy"]
        if "weights" in stored:
            assert targets.weights_N is not None
            assert targets.weights_N.tolist() == [w for values in stored["weights"] for w in values]
        if "tail_sample_ids" in stored:
            assert targets.tail_sample_ids_M.tolist() == [i for ids in stored["tail_sample_ids"] for i in ids]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_plain_tools_read_it_and_writing_it_again_changes_little(file: Path) -> None:
    expected = content(file)
    assert polars.read_parquet(file)["support_ids"].to_list() == [row["support_ids"] for row in expected]
    assert pandas.read_parquet(file)["key"].tolist() == [row["key"] for row in expected]
    [(positions,)] = duckdb.execute("SELECT sum(len(positions)) FROM read_parquet(?)", [str(file)]).fetchall()
    assert positions == sum(len(row["positions"]) for row in expected)
    targets = TargetSettings.model_validate(dict(read_capture(file).identity["targets"]))
    again, table = to_arrow(read_rows(file), targets), pq.read_table(file)
    assert again.schema.equals(capture_schema(targets))
    assert table.schema.equals(again.schema if file in NOT_NULL else older_schema(again.schema))
    same = [name for name in table.column_names if name not in ("tail_logprob", "gold_logprob", "entropy")]
    # Those three are rounded since, in compact precision.
    assert again.select(same).to_pylist() == table.select(same).to_pylist()


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_plain_tools_open_a_folder_of_older_and_newer_files(tmp_path: Path, names: str) -> None:
    for name, file in zip(names, [GOLDEN / "capture-v1-tail_samples.parquet", *NOT_NULL], strict=True):
        shutil.copy(file, tmp_path / f"{name}.parquet")
    ids = [row["support_ids"] for row in content(NOT_NULL[0])] * 2
    every = str(tmp_path / "*.parquet")
    assert [found for (found,) in duckdb.execute("SELECT support_ids FROM read_parquet(?)", [every]).fetchall()] == ids
    assert polars.read_parquet(every)["support_ids"].to_list() == ids
    assert polars.scan_parquet(every).collect()["support_ids"].to_list() == ids
    assert pq.read_table(tmp_path)["support_ids"].to_pylist() == ids
    assert [[list(p) for p in row] for row in pandas.read_parquet(tmp_path)["support_ids"]] == ids


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_satisfies_the_rules_of_its_kind(file: Path) -> None:
    [(kind, reason)] = inspect_capture(file, None)
    assert kind == "mismatch" and "by its footer it is" in reason  # it does not lie in a store
