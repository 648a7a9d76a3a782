"""The JSONL read with nothing but the standard library agrees with the Parquet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill_assets.dataset_shards.discover import folder_of_shards
from distill_assets.dataset_shards.encode import encode_shard
from distill_assets.foundation.errors import ShardError, UsageError
from distill_assets.foundation.home import Home
from distill_assets.foundation.settings import DataSettings
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.interchange import export_encoded, export_jsonl, require_free
from distill_assets.teacher_capture.store import read_rows
from tests import tiny
from tests.bench import Bench


def test_export_is_aligned_with_the_tokens(bench: Bench, tmp_path: Path) -> None:
    captures = [capture_shard(bench.spec, bench.shards[key], bench.store, device="cpu").capture for key in ("s0", "s1")]
    out = tmp_path / "teacher_capture.jsonl"
    assert export_jsonl(captures, out) == 12
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    rows = [row for capture in captures for row in read_rows(capture.path)]
    for line, row in zip(lines, rows, strict=True):
        n = len(line["input_ids"])
        assert line["input_ids"] == row.input_ids.tolist()
        for name in ("topk_ids", "topk_logprobs", "tail_logprob", "gold_logprob", "entropy", "loss_mask"):
            assert len(line[name]) == n
        scored = [t for t in range(n) if line["topk_ids"][t]]
        assert scored == row.targets.positions_P.tolist() and line["topk_ids"][-1] == []
        assert [t + 1 for t in scored] == [t for t in range(n) if line["loss_mask"][t]]
        for p, t in enumerate(scored):
            part = slice(row.targets.offsets_P1[p], row.targets.offsets_P1[p + 1])
            assert line["topk_ids"][t] == row.targets.support_ids_N[part].tolist()
            assert line["topk_logprobs"][t] == row.targets.support_logprobs_N[part].tolist()
            assert line["gold_logprob"][t] == pytest.approx(row.targets.gold_logprob_P[p])


def test_an_export_spares_the_home_and_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    (tmp_path / "link").symlink_to("shards")
    taken = [*Home(tmp_path).own_places, folder_of_shards(tmp_path, DataSettings())]
    for name in ("distill.yaml", "catalog.duckdb", "shards/new.jsonl", "link/new.jsonl", "shards"):
        with pytest.raises(UsageError, match="the home's own"):
            require_free(tmp_path / name, taken, replace=True)
    with pytest.raises(UsageError, match="is no folder"):
        require_free(tmp_path / "nowhere" / "a.jsonl", taken, replace=False)
    with pytest.raises(UsageError, match="--replace"):
        require_free(there, taken, replace=False)
    require_free(there, taken, replace=True)
    require_free(tmp_path / "new.jsonl", taken, replace=False)


def test_a_failed_export_leaves_the_old_file(bench: Bench, tmp_path: Path) -> None:
    capture = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").capture
    out = tmp_path / "out.jsonl"
    export_jsonl([capture], out)
    before = out.read_bytes()
    capture.path.unlink()
    with pytest.raises(Exception, match="damaged or unreadable"):
        export_jsonl([capture], out)
    assert out.read_bytes() == before and [p.name for p in tmp_path.glob("*out*")] == ["out.jsonl"]


def test_a_weight_is_written_unless_it_is_one(bench: Bench, tmp_path: Path) -> None:
    rows = [
        row | {"id": str(i), "weight": w}
        for i, (row, w) in enumerate(zip(tiny.example_rows(3), (1, 0.3, 0), strict=True))
    ]
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", rows)
    capture = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").capture
    export_jsonl([capture], tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["id"]: line.get("weight") for line in lines} == {"0": None, "1": 0.3, "2": 0.0}
    assert "weight" not in lines[0]


def test_encoded_rows_are_what_the_teacher_would_see(bench: Bench, tmp_path: Path) -> None:
    named = [row | {"id": f"r{i}", "weight": 0.5 + i / 2} for i, row in enumerate(tiny.example_rows(3))]
    tiny.write_jsonl(bench.home.root / "shards" / "named.jsonl", named)
    shards = [bench.shards[key] for key in ("named", "s1")]
    out = tmp_path / "rows.jsonl"
    assert export_encoded(shards, bench.spec.encoder, out) == 9
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("id") for line in lines] == ["r0", "r1", "r2", *[None] * 6]
    assert [line.get("weight") for line in lines] == [0.5, None, 1.5, *[None] * 6]
    tiny.write_jsonl(bench.home.root / "shards" / "again.jsonl", lines)
    keys = [row.key for shard in shards for row in encode_shard(shard, bench.spec.encoder).rows]
    assert [row.key for row in encode_shard(bench.shards["again"], bench.spec.encoder).rows] == keys
    tiny.write_jsonl(bench.home.root / "shards" / "named.jsonl", [{"text": 5}])
    weighted = {"input_ids": lines[0]["input_ids"], "token_weights": [0.5] * len(lines[0]["input_ids"])}
    tiny.write_jsonl(bench.home.root / "shards" / "weighted.jsonl", [weighted, lines[1]])
    assert export_encoded([bench.shards["weighted"]], bench.spec.encoder, tmp_path / "weighted.jsonl") == 2
    first, second = map(json.loads, (tmp_path / "weighted.jsonl").read_text().splitlines())
    assert first["token_weights"] == [1.0, *[0.5] * (len(lines[0]["input_ids"]) - 1)]
    assert "token_weights" not in second
    with pytest.raises(ShardError, match="line 1: text must be text"):
        export_encoded([bench.shards["named"]], bench.spec.encoder, out)
    assert len(out.read_text().splitlines()) == 9  # whole, or as it was
